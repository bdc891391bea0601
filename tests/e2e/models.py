"""The model that the servers of these tests serve."""

from pathlib import Path

from benchmarks.random_llama import make_random_llama


def make_tiny_llama(path: Path, layers: int = 2) -> Path:
    """A random Llama that answers in milliseconds, with room for 8,192 tokens."""
    return make_random_llama(
        path,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
