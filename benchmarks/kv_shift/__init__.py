"""Benchmarks of KV shifting attention."""
