"""What `benchmarks/gpu.py` runs: steps, in order, each in a process of its own."""
