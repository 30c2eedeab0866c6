"""Networks of other libraries, wrapped for real and held to what the library promises. `python -m benchmarks.wild`."""
