"""Benchmarks of Starling and of plain vLLM; each writes JSON and a plot to results/."""
