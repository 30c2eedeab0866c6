"""Does attention help? One protocol, many arms, paired seeds."""
