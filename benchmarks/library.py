"""Time to first token of 8 of 100 documents from each tier of a library: `python -m benchmarks.library`.

One server computes all documents, each in a prompt of its own, and ends. The next one, on the same folder, gets prompts
of eight documents. The first prompt with a document finds it in files. The same documents in another order are in the
engine's memory. Much later, when the engine has forgotten them, they are in host memory. Each prompt is also sent to an
engine with dense attention and vLLM's prefix cache. The configurations of a repetition run one after the other. A last
server has host memory for a third of the documents: it has forgotten them when they are asked for once more, and finds
them in files again. Writes results/library.json and .png. Takes about 7 minutes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.block_positions import MARK, OWN, make_documents, prompt
from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import numbers_table, plot_medians, ratios_over, saved_figure, write_json
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA

HEAD_TOKENS, RETRIEVED = 256, 8
DENSE, FILES, HOST, MEMORY = "dense", "from files, after a restart", "from host memory", "from the engine's memory"
AGAIN = "from files, forgotten by host memory"
ENGINE_MEMORY, HOST_MEMORY, LITTLE_HOST_MEMORY = 192 << 20, "2GiB", "256MiB"


def make_engine(model: Path, folder: Path | None, host: str = HOST_MEMORY) -> Engine:
    """Make an engine whose own memory holds two to three prompts, with a library or without."""
    entry = {} if folder is None else {"star": "on", "star_library": f"{folder}:{host}", "star_segments": "auto"}
    arguments = ENGINE | {"additional_config": {"starling": entry}, "kv_cache_memory_bytes": ENGINE_MEMORY}
    return Engine(model, dtype="float32", enable_prefix_caching=True, max_model_len=20000, **arguments)


class Prompts:
    """The documents, and prompts of some of them.

    Args:
        mean: tokens of a document, on average.
    """

    def __init__(self, number: int, mean: int) -> None:
        self.tokens = random.Random(0)
        self.head = [self.tokens.randrange(MARK) for _ in range(HEAD_TOKENS)]
        self.documents = make_documents(number, number * mean, self.tokens)

    def of(self, numbers: list[int]) -> tuple[list[int], dict[str, Any]]:
        """Return the tokens of a prompt with these documents and a question of its own, and its options."""
        question = [self.tokens.randrange(MARK) for _ in range(QUERY_TOKENS)]
        ids = prompt(self.head, [self.documents[number] for number in numbers], question)
        starts = [place for place, token in enumerate(ids[: len(ids) - QUERY_TOKENS]) if token == MARK]
        return ids, OWN | {"star_segments": starts}


def fill(model: Path, folder: Path, prompts: Prompts) -> float:
    """Compute all documents into the library; returns the seconds."""
    with make_engine(model, folder) as engine:
        started = time.monotonic()
        for number in track(range(len(prompts.documents)), description="documents"):
            engine.generate(*prompts.of([number]))
        seconds = time.monotonic() - started
        for _ in range(3):  # what the last step computed is stored in the next one
            engine.generate([1] * QUERY_TOKENS)
            time.sleep(1)
    return seconds


def measure(model: Path, folder: Path, prompts: Prompts) -> tuple[dict[str, list[float]], dict[str, Counter[str]]]:
    """Return configuration -> seconds to the first token, and where the documents' tokens came from."""
    order = random.Random(1).sample(range(len(prompts.documents)), len(prompts.documents))
    groups = [order[start : start + RETRIEVED] for start in range(0, len(order) - RETRIEVED + 1, RETRIEVED)]
    seconds: dict[str, list[float]] = {name: [] for name in (DENSE, FILES, AGAIN, HOST, MEMORY)}
    sources: dict[str, Counter[str]] = {name: Counter() for name in (FILES, AGAIN, HOST, MEMORY)}

    def ask(engine: Engine, name: str, numbers: list[int]) -> None:
        ids, options = prompts.of(numbers)
        answer = engine.generate(ids, options)
        seconds[name].append(answer["seconds"])
        sources[name].update(sum(map(Counter, answer["sources"]), Counter()))

    with make_engine(model, folder) as library, make_engine(model, None) as dense:
        for engine in (library, dense):
            engine.generate([1] * 4096)

        for group in track(groups, description="after a restart"):
            ask(library, FILES, group)
            ask(library, MEMORY, group[::-1])
            seconds[DENSE].append(dense.generate(prompts.of(group)[0])["seconds"])
        for group in track(groups, description="forgotten by the engine"):
            ask(library, HOST, group)
    with make_engine(model, folder, LITTLE_HOST_MEMORY) as little:
        for group in groups:
            little.generate(*prompts.of(group))
        for group in track(groups, description="forgotten by host memory"):
            ask(little, AGAIN, group)
    return seconds, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1000, help="of a document, on average")
    args = parser.parse_args()
    prompts = Prompts(args.documents, args.tokens)
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        folder = Path(directory) / "pages"
        filled = fill(model, folder, prompts)
        files = list(folder.rglob("*.bin"))
        num_bytes = sum(file.stat().st_size for file in files)
        seconds, sources = measure(model, folder, prompts)
    title = f"random Llama, 2 layers, float32, {RETRIEVED} of {args.documents} documents of {args.tokens:,} tokens"
    over = ratios_over(seconds, DENSE)
    table = numbers_table(title, ("documents", "TTFT s (median)", "dense over it", "tokens from"))
    for name, values in seconds.items():
        ratio = f"{1 / over[name]['median']:.1f}x" if name in over else ""
        found = ", ".join(f"{kind} {tokens:,}" for kind, tokens in sources.get(name, {}).items() if tokens)
        table.add_row(name, f"{statistics.median(values):.2f}", ratio, found)
    Console().print(table)
    Console().print(f"{len(files)} files, {num_bytes / 2**20:.0f} MiB, computed in {filled:.0f} s")
    result = {
        "title": title,
        "files": len(files),
        "file_bytes": num_bytes,
        "fill_seconds": filled,
        "seconds": seconds,
        "over_dense": over,
        "document_tokens": sources,
    }
    path = write_json("library", result)
    with saved_figure(path.with_suffix(".png"), figsize=(6.5, 3)) as (figure, axis):
        plot_medians(axis, seconds, ".2f")
        axis.set_xlabel("seconds to the first token")
        figure.suptitle(
            f"The first token of {RETRIEVED} of {args.documents} documents, by where their KV is", fontsize=10
        )
    print(path)


if __name__ == "__main__":
    main()
