"""vLLM's scheduler with Star Attention: page keys, reuse of star blocks, and steps that long prompts share fairly."""
