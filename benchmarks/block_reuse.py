"""Time to first token after an edit in the middle of a long prompt: `python -m benchmarks.block_reuse`.

Compares Star Attention that reuses blocks at any position with vLLM's prefix cache, under dense and under Star
Attention. Each repetition replaces another token of the middle document, or inserts one more token, and runs all
configurations one after the other. For the inserted token, Star Attention also runs with documents, whose blocks are
reused wherever they stand. Writes results/block_reuse.json and .png. Takes about 8 minutes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import numbers_table, plot_medians, ratios_over, saved_figure, write_json
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA

BLOCKS, MARK = 16, 255
REUSED, DOCUMENTS = "star, blocks reused", "star, documents"
PREFIX = ("dense, prefix cache", "star, prefix cache")
REPLACED, LONGER = "a token replaced", "one token more"
OURS = {REPLACED: REUSED, LONGER: DOCUMENTS}


def make_engine(model: Path, reuse: str) -> Engine:
    arguments = ENGINE | {"additional_config": {"starling": {"scheduler": {"star_block_reuse": reuse}}}}
    memory = 2 << 30
    return Engine(model, dtype="float32", kv_cache_memory_bytes=memory, enable_prefix_caching=True, **arguments)


def make_documents(length: int) -> list[list[int]]:
    """One document for each star block: its mark, and tokens that leave some room in the block.

    The last document also leaves room for the query.
    """
    tokens = random.Random(0)
    size = length // BLOCKS - QUERY_TOKENS
    sizes = [size] * (BLOCKS - 1) + [size - QUERY_TOKENS]
    return [[MARK, *(tokens.randrange(MARK) for _ in range(size - 1))] for size in sizes]


def measure(model: Path, length: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Kind of edit -> configuration -> seconds to the first token after each edit."""
    sizes = {"star_block_size": length // BLOCKS, "star_overlap_size": 0}
    star = {"star": "on", "star_query_tokens": QUERY_TOKENS} | sizes
    query = [1] * QUERY_TOKENS
    seconds: dict[str, dict[str, list[float]]] = {}
    with make_engine(model, "on") as ours, make_engine(model, "off") as plain:
        prefix = {PREFIX[0]: (plain, {}), PREFIX[1]: (plain, star)}
        for edit, configurations in {
            REPLACED: {REUSED: (ours, star)} | prefix,
            LONGER: {DOCUMENTS: (ours, star), REUSED: (ours, star)} | prefix,
        }.items():
            documents = make_documents(length)
            middle = documents[BLOCKS // 2]
            seconds[edit] = {name: [] for name in configurations}
            for repeat in track(range(-1, repeats), description=f"{length:,} tokens, {edit}"):
                position = len(middle) // 2 + repeat
                if repeat >= 0:
                    middle[position : position + (edit == REPLACED)] = [MARK + 1]
                ids = [token for document in documents for token in document] + query
                starts = [place for place, token in enumerate(ids) if token == MARK]
                for name, (engine, options) in configurations.items():
                    if name == DOCUMENTS:
                        options = options | {"star_segments": starts}
                    took = engine.generate(ids, options)["seconds"]
                    if repeat >= 0:
                        seconds[edit][name].append(took)
    return seconds


def plot(title: str, seconds: dict[str, dict[str, list[float]]], path: Path) -> None:
    with saved_figure(path, len(seconds), figsize=(6, 4.5), sharex=True) as (figure, axes):
        for axis, (edit, times) in zip(axes, seconds.items(), strict=True):
            plot_medians(axis, times, ".2f")
            axis.set_title(edit, fontsize=9)
        axes[-1].set_xlabel("time to first token after an edit in the middle, seconds")
        figure.suptitle(title, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        seconds = measure(model, args.tokens, args.repeats)
    title = f"random Llama, 2 layers, float32, {args.tokens:,} tokens in {BLOCKS} blocks"
    table = numbers_table(title, ("edit", "configuration", "TTFT s (median)", "over ours"))
    ratios: dict[str, Any] = {}
    for edit, times in seconds.items():
        over = ratios[edit] = ratios_over(times, OURS[edit])
        for name, values in times.items():
            ratio = f"{over[name]['median']:.1f}x" if name in over else ""
            table.add_row(edit, name, f"{statistics.median(values):.2f}", ratio)
    Console().print(table)
    result = {"title": title, "query_tokens": QUERY_TOKENS, "seconds": seconds, "over_ours": ratios}
    path = write_json("block_reuse", result)
    plot(title, seconds, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
