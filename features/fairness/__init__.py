"""Long prompts share steps with others."""
