"""Starling's paged attention as attention backends of vLLM, for GPUs."""
