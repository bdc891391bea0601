"""Measurements of Starling beside plain vLLM; each writes JSON and a plot."""
