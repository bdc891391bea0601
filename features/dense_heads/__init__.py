"""Heads that see everything, while the others see star blocks."""
