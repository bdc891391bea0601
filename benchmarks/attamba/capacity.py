"""Tokens that fit a KV cache of 1 GiB: `python -m benchmarks.attamba.capacity`.

The benchmark compares Attamba at several P with the transformer of the same shape. For each it prints the tokens that
vLLM reports at start ("KV cache size"), the tokens that the bytes allow, and the tokens of requests that decode: the
report has room for a whole step in the windows of each request, which a request has during its prefill only. The
figures come from vLLM's own cache planning, without an engine; --check compares two of them with started engines.
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

from benchmarks.attamba.shapes import Shape, make_models, parse_shape
from benchmarks.engine import Engine
from benchmarks.report import OUT, saved_figure, write_json
from starling.attention_backends.attamba.cache import model_specs
from starling.engine_ext.start import plugin
from starling.lab.doctor.doctor import num_pages_held
from starling.vllm_compat.config import kv_cache_capacity

BYTES = 1 << 30
DTYPE = torch.bfloat16
MIN_OF_ALLOWED = 0.9  # smallest accepted ratio of reported to allowed tokens


def allowed_tokens(shape: Shape, length: int, step: int, chunk_size: int | None, window: int) -> int:
    """Return the tokens that the bytes allow without pages, in a fractional number of requests of ``length`` tokens.

    A row is K|V of one token and layer, 2 dim values. A request of the transformer has one row per token. A request of
    Attamba has one row per P tokens and one for token 0. During its prefill it also has rows of L + ``step`` tokens and
    what the scans read of P - 1 + ``step`` tokens: vLLM allocates pages for the tokens of a step before it frees the
    pages that leave the windows.

    Args:
        shape: shape of both models.
        length: max_model_len.
        step: max_num_batched_tokens.
        chunk_size: P, or None for the transformer.
        window: L.
    """
    if chunk_size is None:
        rows = float(length)
    else:
        window_tokens, open_chunk = min(window + step, length), min(chunk_size - 1 + step, length)
        scanned = 2 * (shape.inner + 2 * shape.state + shape.mixer_heads) / (2 * shape.dim)  # rows of a token
        rows = length / chunk_size + 1 + window_tokens + open_chunk * scanned
    return int(BYTES / (rows * shape.layers * 2 * shape.dim * DTYPE.itemsize) * length)


def planned_tokens(model: Path, length: int, step: int) -> dict[str, int]:
    """Return the tokens of vLLM's cache planning: ``reported`` for the checkpoint at start, and ``held``.

    ``held`` are those of requests of ``length`` tokens that decode, whose windows have pages for their last tokens
    only.
    """
    arguments = {"max_model_len": length, "max_num_batched_tokens": step, "dtype": "bfloat16"}
    config = EngineArgs(str(model), skip_tokenizer_init=True, enforce_eager=True, **arguments).create_engine_config()
    own = config.model_config.hf_config
    if own.model_type == "attamba":
        specs: dict[str, Any] = dict(model_specs(own, DTYPE))
    else:
        heads, size = own.num_key_value_heads, own.hidden_size // own.num_attention_heads
        page_size = config.cache_config.block_size
        spec = FullAttentionSpec(block_size=page_size, num_kv_heads=heads, head_size=size, dtype=DTYPE)
        specs = {f"layers.{layer}": spec for layer in range(own.num_hidden_layers)}
    request_bytes = sum(
        spec.page_size_bytes * num_pages_held(length, spec.block_size, getattr(spec, "sliding_window", None))
        for spec in specs.values()
    )
    return {"reported": kv_cache_capacity(config, specs, BYTES), "held": BYTES * length // request_bytes}


def engine_tokens(model: Path, length: int, step: int) -> int:
    """Return the tokens that a started engine reports for the checkpoint."""
    sizes = {"max_model_len": length, "max_num_batched_tokens": step, "kv_cache_memory_bytes": BYTES}
    with Engine(model, dtype="bfloat16", enable_prefix_caching=True, **sizes) as engine:
        return engine.cache_tokens


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the reported and the allowed tokens of each row."""
    with saved_figure(path, figsize=(8, 0.8 + 0.3 * len(rows))) as (_, axis):
        labels = [f"{row['model']}, {row['max_model_len']:,} per request, steps of {row['step']:,}" for row in rows]
        colours = ["grey" if row["model"] == "transformer" else "C0" for row in rows]
        axis.barh(labels, [row["reported"] for row in rows], color=colours)
        axis.plot([row["allowed"] for row in rows], labels, "k|", markersize=12, label="allowed by the bytes")
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_xlabel("tokens in a KV cache of 1 GiB, bfloat16")
        axis.legend(fontsize=8)


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
    parser.add_argument("--check", action="store_true", help="compare two figures with started engines")
    args = parser.parse_args()
    plugin.register()
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, tuple[Path, int | None]] = {}
        for chunk_size in args.chunks:
            paths = make_models(Path(folder) / str(chunk_size), args.shape, chunk_size, args.window, DTYPE)
            models.setdefault("transformer", (paths["transformer"], None))
            models[f"Attamba P = {chunk_size}"] = (paths["attamba"], chunk_size)
        for length in args.lengths:
            for step in args.steps:
                for name, (model, chunk_size) in models.items():
                    row = {"model": name, "max_model_len": length, "step": step}
                    row |= planned_tokens(model, length, step)
                    row["allowed"] = allowed_tokens(args.shape, length, step, chunk_size, args.window)
                    rows.append(row)
        for row in [rows[-1], rows[1]] if args.check else []:
            tokens = engine_tokens(models[row["model"]][0], row["max_model_len"], row["step"])
            checks.append(row | {"started": tokens})
    columns = ("tokens in 1 GiB", "of what the bytes allow", "over transformer", "in decode", "over transformer")
    table = Table("model", "per request", "per step", *columns)
    for row in rows:
        same = ("max_model_len", "step")
        base = next(other for other in rows if all(other[key] == row[key] for key in same))
        row["of_allowed"] = row["reported"] / row["allowed"]
        row["over_transformer"] = row["reported"] / base["reported"]
        row["held_over_transformer"] = row["held"] / base["held"]
        figures = [f"{row['reported']:,}", f"{row['of_allowed']:.1%}", f"{row['over_transformer']:.1f}x"]
        figures += [f"{row['held']:,}", f"{row['held_over_transformer']:.1f}x"]
        table.add_row(row["model"], f"{row['max_model_len']:,}", f"{row['step']:,}", *figures)
    Console(width=130).print(table)
    for check in checks:
        print("{model}, {max_model_len:,} per request, steps of {step:,}: engine reports {started:,}".format(**check))
    result = {"shape": asdict(args.shape), "window": args.window, "rows": rows, "starts": checks}
    path = write_json("attamba_capacity", result)
    plot(rows, OUT / "attamba_capacity.png")
    print(f"{path} and {OUT / 'attamba_capacity.png'}")
    wrong = [row for row in rows if row["of_allowed"] < MIN_OF_ALLOWED]
    wrong += [check for check in checks if check["started"] != check["reported"]]
    if wrong:
        raise SystemExit(f"below {MIN_OF_ALLOWED:.0%} of the allowed tokens, or different from an engine: {wrong}")


if __name__ == "__main__":
    main()
