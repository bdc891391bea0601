"""Benchmarks of the attention kernels alone."""
