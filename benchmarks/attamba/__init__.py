"""Benchmarks of Attamba."""
