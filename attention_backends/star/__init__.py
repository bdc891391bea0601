"""Star Attention on any paged full-attention backend of vLLM, by virtual rows."""
