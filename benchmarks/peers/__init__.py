"""The sides of the throughput benchmark, each for a process of its own."""
