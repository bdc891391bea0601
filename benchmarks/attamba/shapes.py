"""A random Attamba and a random transformer of the same shape, which the Attamba benchmarks compare.

Both models have the same width, layers, heads and feed-forward. The transformer has a K and V head for each query head,
as Attamba has. The default width is that of the paper's models of 64 M parameters. All layers are equal, so the default
of two layers gives the same ratios as eight.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.attamba.random_model import make_random_attamba
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
    mixer_heads: int = 8

    def llama(self) -> dict[str, Any]:
        """Return the fields of LlamaConfig."""
        return {
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.positions,
        }

    def attamba(self, chunk_size: int, window: int) -> dict[str, Any]:
        """Return the fields of AttambaConfig for P = ``chunk_size`` and L = ``window``."""
        own = {
            "head_dim": self.dim // self.heads,
            "ssm_heads": self.mixer_heads,
            "ssm_inner": self.inner,
            "ssm_state_dim": self.state,
        }
        common = {name: value for name, value in self.llama().items() if name != "num_key_value_heads"}
        return common | own | {"token_chunk": chunk_size, "leading_tokens": window}


def parse_shape(text: str) -> Shape:
    """Return the default shape with the sizes of ``name=number,...`` replaced.

    Raises:
        argparse.ArgumentTypeError: the text has another form or an unknown name.
    """
    try:
        return replace(Shape(), **{name: int(value) for name, value in (pair.split("=") for pair in text.split(","))})
    except (TypeError, ValueError) as error:
        allowed = ", ".join(asdict(Shape()))
        raise argparse.ArgumentTypeError(f"{text!r} is not name=number,... Allowed names: {allowed}") from error


def make_models(folder: Path, shape: Shape, chunk_size: int, window: int, dtype: torch.dtype) -> dict[str, Path]:
    """Write both checkpoints under ``folder``; returns their paths as ``transformer`` and ``attamba``."""
    return {
        "transformer": make_random_llama(folder / "transformer", dtype=dtype, **shape.llama()),
        "attamba": make_random_attamba(folder / "attamba", dtype=dtype, **shape.attamba(chunk_size, window)),
    }
