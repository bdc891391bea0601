"""Measures what Star Attention costs in answers: dense and star plans on one server, compared prompt by prompt.

A client of any server with OpenAI's API and vLLM's /tokenize, or a tokenizer of one's own in its place. It imports
neither vLLM nor torch, except for that tokenizer.
"""
