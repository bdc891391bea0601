"""Starling's engine room: plugin entry point, activation, worker, models and serving, on plain vLLM."""
