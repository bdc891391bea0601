"""KV shifting attention (arXiv 2411.19574): K and V of a token mixed with those of the token before it."""
