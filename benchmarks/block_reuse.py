"""Time to first token after an edit in the middle of a long prompt: `python -m benchmarks.block_reuse`.

Star with blocks reused anywhere, against vLLM's prefix cache under dense attention and under star: in each
repetition another token of the middle block changes, and the three run right after one another. Writes
results/block_reuse.json and .png. Takes about 5 minutes.
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
from rich.table import Table

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import ratio_interval, write_json
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA

BLOCKS = 16
STAR = {"star": "on", "star_num_blocks": BLOCKS, "star_query_tokens": QUERY_TOKENS}
OURS = "star, blocks reused"
PREFIX = ("dense, prefix cache", "star, prefix cache")


def make_engine(model: Path, reuse: str) -> Engine:
    arguments = ENGINE | {"additional_config": {"starling": {"scheduler": {"star_block_reuse": reuse}}}}
    memory = 2 << 30
    return Engine(model, dtype="float32", kv_cache_memory_bytes=memory, enable_prefix_caching=True, **arguments)


def measure(model: Path, length: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token after each edit, by configuration."""
    tokens = random.Random(0)
    ids = [tokens.randrange(255) for _ in range(length)]
    middle = length // 2 + length // BLOCKS // 2
    with make_engine(model, "on") as ours, make_engine(model, "off") as plain:
        runs = {OURS: (ours, STAR), PREFIX[0]: (plain, {}), PREFIX[1]: (plain, STAR)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for engine, options in runs.values():
            engine.generate(ids, options)
        for repeat in track(range(repeats), description=f"{length:,} tokens"):
            ids[middle + repeat] = 255
            for name, (engine, options) in runs.items():
                seconds[name].append(engine.generate(ids, options)["seconds"])
    return seconds


def plot(title: str, seconds: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3))
    medians = [statistics.median(times) for times in seconds.values()]
    bars = axis.barh(list(seconds), medians)
    axis.bar_label(bars, [f"{median:.2f} s" for median in medians], padding=3)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.set_xlabel("time to first token after an edit in the middle, seconds")
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        seconds = measure(model, args.tokens, args.repeats)
    title = f"random Llama, 2 layers, float32, {args.tokens:,} tokens in {BLOCKS} blocks"
    ratios: dict[str, Any] = {
        name: dict(zip(("median", "low", "high"), ratio_interval(seconds[OURS], seconds[name]), strict=True))
        for name in PREFIX
    }
    table = Table(title=title)
    for column in ("configuration", "TTFT s (median)", "over reused blocks"):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        table.add_row(
            name, f"{statistics.median(times):.2f}", f"{ratios[name]['median']:.1f}x" if name in ratios else ""
        )
    Console().print(table)
    result = {"title": title, "query_tokens": QUERY_TOKENS, "seconds": seconds, "over_reused_blocks": ratios}
    path = write_json("block_reuse", result)
    plot(title, seconds, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
