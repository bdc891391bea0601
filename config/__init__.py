"""The options of a server and of a request: pydantic models, and the `starling` entry that holds them.

The lowest layer: it imports nothing of Starling's, and neither vLLM nor torch.
"""
