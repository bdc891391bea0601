"""Attamba (arXiv 2411.17685): attention over one K/V state per chunk of tokens, and over a window of recent ones."""
