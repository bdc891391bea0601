"""vLLM's scheduler with the hooks of features, and the prefix-cache keys of star pages."""
