"""Fair steps: long prompts share them with other requests."""
