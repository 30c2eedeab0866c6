"""What a network does, found by running a copy of it. Knows no attention."""
