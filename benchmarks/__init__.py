"""What measures the engine: exactness, throughput, and what limits them. `benchmark.py` runs most of it."""
