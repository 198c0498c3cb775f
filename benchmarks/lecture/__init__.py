"""Parts of `benchmarks/autoencoders.py`, one function each."""
