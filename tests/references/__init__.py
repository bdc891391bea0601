"""Attention methods and models in plain torch, float32: explicit masks, no pages. The engine is held against them."""
