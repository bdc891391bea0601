"""Paged attention on a CPU: the C++ op, its build, a fallback in plain torch, and the selection of a batch's op."""
