"""Time to first token after an edit in the middle of a long prompt: `python -m benchmarks.block_reuse`.

Compares Star Attention that reuses blocks at any position with vLLM's prefix cache, under dense and under Star
Attention. Each repetition replaces another token of the middle document, or inserts one more token, and runs all
configurations one after the other. For the inserted token, Star Attention also runs with documents, whose blocks are
reused wherever they stand. Writes results/block_reuse.json and .png. Takes about 8 minutes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from rich.progress import track

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import report_medians
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA

BLOCKS, MARK = 16, 255
REUSED, DOCUMENTS = "star, blocks reused", "star, documents"
PREFIX = ("dense, prefix cache", "star, prefix cache")
REPLACED, LONGER = "a token replaced", "one token more"
OURS = {REPLACED: REUSED, LONGER: DOCUMENTS}
TITLES = {kind: f"first token, {kind}, s" for kind in OURS}


def make_engine(model: Path, reuse: str) -> Engine:
    arguments = ENGINE | {"additional_config": {"starling": {"scheduler": {"star_block_reuse": reuse}}}}
    memory = 2 << 30
    return Engine(model, dtype="float32", kv_cache_memory_bytes=memory, enable_prefix_caching=True, **arguments)


def make_documents(length: int) -> list[list[int]]:
    """Return one document for each star block: its mark, and tokens that leave some room in the block.

    The last document also leaves room for the query.
    """
    tokens = random.Random(0)
    size = length // BLOCKS - QUERY_TOKENS
    sizes = [size] * (BLOCKS - 1) + [size - QUERY_TOKENS]
    return [[MARK, *(tokens.randrange(MARK) for _ in range(size - 1))] for size in sizes]


def measure(model: Path, length: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return kind of edit -> configuration -> seconds to the first token after each edit."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        seconds = measure(model, args.tokens, args.repeats)
    title = f"after an edit in the middle: random Llama, 2 layers, float32, {args.tokens:,} tokens in {BLOCKS} blocks"
    shape = {"digits": ".2f", "figsize": (6, 4.5)}
    report_medians("block_reuse", title, seconds, OURS, TITLES, **shape, query_tokens=QUERY_TOKENS)


if __name__ == "__main__":
    main()
