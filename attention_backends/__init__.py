"""Attention methods, one folder each: what vLLM's backends need to run them on its own kernels."""
