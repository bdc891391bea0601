"""A random Attamba and the transformer of its shape: what the Attamba benchmarks set beside one another.

Both have the same width, layers, heads and feed-forward, and the transformer a K and V head for each query head, as
Attamba has. The default is the width of the paper's 64-M-parameter models; layers are alike, so two show what eight do.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_attamba import make_random_attamba
from benchmarks.random_llama import make_random_llama


@dataclass(frozen=True)
class Shape:
    """Sizes of both models, and of Attamba's mixers."""

    dim: int = 512
    layers: int = 2
    heads: int = 8
    ffn: int = 1536
    inner: int = 256
    state: int = 128
    positions: int = 65_536

    def llama(self) -> dict[str, Any]:
        return {
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.positions,
        }

    def attamba(self, chunk: int, window: int) -> dict[str, Any]:
        own = {"head_dim": self.dim // self.heads, "ssm_heads": 8, "ssm_inner": self.inner, "ssm_state_dim": self.state}
        shared = {name: value for name, value in self.llama().items() if name != "num_key_value_heads"}
        return shared | own | {"token_chunk": chunk, "leading_tokens": window}


def parse_shape(text: str) -> Shape:
    """``name=value,...`` over the default (raises argparse.ArgumentTypeError)."""
    try:
        return replace(Shape(), **{name: int(value) for name, value in (pair.split("=") for pair in text.split(","))})
    except (TypeError, ValueError) as error:
        allowed = ", ".join(asdict(Shape()))
        raise argparse.ArgumentTypeError(f"{text!r} is not name=number,... with names of {allowed}") from error


def make_models(folder: Path, shape: Shape, chunk: int, window: int, dtype: torch.dtype) -> dict[str, Path]:
    """{"transformer", "attamba"}: checkpoints under ``folder``."""
    return {
        "transformer": make_random_llama(folder / "transformer", dtype=dtype, **shape.llama()),
        "attamba": make_random_attamba(folder / "attamba", dtype=dtype, **shape.attamba(chunk, window)),
    }
