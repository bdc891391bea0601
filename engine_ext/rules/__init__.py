"""What an engine can't run, and why: the rules of each feature, held against vLLM's configuration."""
