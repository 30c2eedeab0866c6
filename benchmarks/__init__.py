"""What drifa_attn costs, measured: see `benchmarks/README.md`."""
