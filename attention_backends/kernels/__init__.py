"""Attention over a paged KV cache that also returns the log-sum-exp: one contract, several implementations."""
