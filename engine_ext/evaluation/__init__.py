"""Measures what Star Attention costs in answers: dense and star plans on one server, compared prompt by prompt.

A client of any server with OpenAI's API and vLLM's /tokenize. It imports neither vLLM nor torch.
"""
