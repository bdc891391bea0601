"""Tokens that fit a KV cache of 1 GiB: `python -m benchmarks.attamba_capacity`.

Attamba at several P beside the transformer of its shape, as vLLM reports it at start ("KV cache size"), beside what the
bytes allow. vLLM's own cache planning gives the figures, no engine is started; --check holds two against real starts.
Writes results/attamba_capacity.json and .png.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from attention_backends.attamba.cache import model_specs
from benchmarks.attamba_shapes import Shape, make_models, parse_shape
from benchmarks.engine import Engine
from benchmarks.report import OUT, write_json
from engine_ext import compat, plugin

BYTES = 1 << 30
DTYPE = torch.bfloat16
LEAST = 0.9  # of what the bytes allow


def allowed(shape: Shape, length: int, step: int, chunk: int | None, window: int) -> int:
    """Tokens that the bytes allow without pages: requests of ``length`` tokens, not a whole number of them.

    A row is K|V of one token and layer, of 2 dim values. A request of a transformer holds a row a token. One of Attamba
    (P is ``chunk``) holds a row for each P tokens and one for token 0, and while it is prefilled rows of L + ``step``
    tokens and inputs, half a row each, of P - 1 + ``step``: a step's tokens are written before what they push out of
    the windows is given back.
    """
    if chunk is None:
        rows = float(length)
    else:
        recent, open_chunk = min(window + step, length), min(chunk - 1 + step, length)
        rows = length / chunk + 1 + recent + open_chunk / 2
    return int(BYTES / (rows * shape.layers * 2 * shape.dim * DTYPE.itemsize) * length)


def reported(model: Path, length: int, step: int) -> int:
    """What vLLM would report for the checkpoint."""
    arguments = {"max_model_len": length, "max_num_batched_tokens": step, "dtype": "bfloat16"}
    config = EngineArgs(str(model), skip_tokenizer_init=True, enforce_eager=True, **arguments).create_engine_config()
    own = config.model_config.hf_config
    if own.model_type == "attamba":
        specs: dict[str, Any] = dict(model_specs(own, DTYPE))
    else:
        heads, size = own.num_key_value_heads, own.hidden_size // own.num_attention_heads
        page = config.cache_config.block_size
        spec = FullAttentionSpec(block_size=page, num_kv_heads=heads, head_size=size, dtype=DTYPE)
        specs = {f"layers.{layer}": spec for layer in range(own.num_hidden_layers)}
    return compat.kv_cache_capacity(config, specs, BYTES)


def started(model: Path, length: int, step: int) -> int:
    """What an engine that does start reports."""
    sizes = {"max_model_len": length, "max_num_batched_tokens": step, "kv_cache_memory_bytes": BYTES}
    with Engine(model, dtype="bfloat16", enable_prefix_caching=True, **sizes) as engine:
        return engine.cache_tokens


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.3 * len(rows)))
    labels = [f"{row['model']}, {row['max_model_len']:,} a request, steps of {row['step']:,}" for row in rows]
    colours = ["grey" if row["model"] == "transformer" else "C0" for row in rows]
    axis.barh(labels, [row["reported"] for row in rows], color=colours)
    axis.plot([row["allowed"] for row in rows], labels, "k|", markersize=12, label="what the bytes allow")
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("tokens in a KV cache of 1 GiB, bfloat16")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=parse_shape, default=Shape(layers=8), help="name=number,...; 8 layers by default"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8, 64], help="P (%(default)s)")
    parser.add_argument("--window", type=int, default=16, help="L (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768], help="max_model_len (%(default)s)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[512, 4096], help="max_num_batched_tokens (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="start two engines and compare")
    args = parser.parse_args()
    plugin.register()
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, tuple[Path, int | None]] = {}
        for chunk in args.chunks:
            made = make_models(Path(folder) / str(chunk), args.shape, chunk, args.window, DTYPE)
            models.setdefault("transformer", (made["transformer"], None))
            models[f"Attamba P = {chunk}"] = (made["attamba"], chunk)
        for length in args.lengths:
            for step in args.steps:
                for name, (model, chunk) in models.items():
                    row = {"model": name, "max_model_len": length, "step": step}
                    row["reported"] = reported(model, length, step)
                    row["allowed"] = allowed(args.shape, length, step, chunk, args.window)
                    rows.append(row)
        for row in [rows[-1], rows[1]] if args.check else []:
            real = started(models[row["model"]][0], row["max_model_len"], row["step"])
            checks.append(row | {"started": real})
    table = Table("model", "a request", "a step", "tokens in 1 GiB", "of what the bytes allow", "over the transformer")
    for row in rows:
        same = ("max_model_len", "step")
        base = next(other for other in rows if all(other[key] == row[key] for key in same))
        row["of_allowed"], row["over_transformer"] = (
            row["reported"] / row["allowed"],
            row["reported"] / base["reported"],
        )
        figures = (f"{row['reported']:,}", f"{row['of_allowed']:.1%}", f"{row['over_transformer']:.2f}x")
        table.add_row(row["model"], f"{row['max_model_len']:,}", f"{row['step']:,}", *figures)
    Console(width=130).print(table)
    for check in checks:
        print("{model}, {max_model_len:,} a request, steps of {step:,}: an engine reports {started:,}".format(**check))
    path = write_json(
        "attamba_capacity", {"shape": asdict(args.shape), "window": args.window, "rows": rows, "starts": checks}
    )
    plot(rows, OUT / "attamba_capacity.png")
    print(f"{path} and {OUT / 'attamba_capacity.png'}")
    wrong = [row for row in rows if row["of_allowed"] < LEAST] + [c for c in checks if c["started"] != c["reported"]]
    if wrong:
        raise SystemExit(f"below {LEAST:.0%}, or another figure than an engine's: {wrong}")


if __name__ == "__main__":
    main()
