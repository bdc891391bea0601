"""Cost and savings of documents: `python -m benchmarks.block_positions`.

Three measurements on a random Llama, each beside dense attention with vLLM's prefix cache on the same engine:

- an edit: 16 documents of unequal length, 32,768 tokens; one document in the middle grows by a token;
- RAG: 8 of 100 documents in any order, about 16,000 tokens, once all documents have been computed for other prompts;
- decode: the time of a token behind the 16 documents.

The configurations of a repetition run one after the other. Writes results/block_positions.json and .png. Takes about
10 minutes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import report_medians
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA

MARK, HEAD_TOKENS, NEW_TOKENS = 255, 256, 33
DOCUMENTS, LIBRARY, RETRIEVED, MEAN_TOKENS = 16, 100, 8, 2000
BLOCK, DENSE, STAR = "positions of a block's own", "dense", "star"
OWN = {"star": "on", "star_query_tokens": QUERY_TOKENS}
SIZES = {"star": "on", "star_block_size": 2048, "star_overlap_size": 0, "star_query_tokens": QUERY_TOKENS}
CONFIGURATIONS: dict[str, dict[str, Any]] = {BLOCK: OWN, DENSE: {}, STAR: SIZES}


def make_documents(number: int, total: int, tokens: random.Random) -> list[list[int]]:
    """Return documents of unequal length that have ``total`` tokens together."""
    weights = [tokens.uniform(0.3, 1.7) for _ in range(number)]
    lengths = [round(total * weight / sum(weights)) for weight in weights]
    lengths[-1] += total - sum(lengths)
    return [[MARK, *(tokens.randrange(MARK) for _ in range(length - 1))] for length in lengths]


def options_of(name: str, ids: list[int]) -> dict[str, Any]:
    """Return the options of a configuration, with where the documents of a prompt start."""
    options = CONFIGURATIONS[name]
    starts = [place for place, token in enumerate(ids[: len(ids) - QUERY_TOKENS]) if token == MARK]
    return options | {"star_segments": starts} if options is OWN else options


def prompt(head: list[int], documents: list[list[int]], question: list[int]) -> list[int]:
    return [*head, *(token for document in documents for token in document), *question]


class Measurement:
    """One engine, and the prompts of all measurements.

    Args:
        total: tokens of the prompt with 16 documents.
    """

    def __init__(self, engine: Engine, total: int, repeats: int) -> None:
        self.engine, self.repeats = engine, repeats
        self.tokens = random.Random(0)
        self.head = [self.tokens.randrange(MARK) for _ in range(HEAD_TOKENS)]
        self.documents = make_documents(DOCUMENTS, total - HEAD_TOKENS - QUERY_TOKENS, self.tokens)

    def question(self) -> list[int]:
        return [self.tokens.randrange(MARK) for _ in range(QUERY_TOKENS)]

    def edit(self) -> dict[str, list[float]]:
        """Return configuration -> seconds to the first token after each edit."""
        seconds: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
        middle = self.documents[DOCUMENTS // 2]
        for repeat in track(range(-1, self.repeats), description="a document grows by a token"):
            middle.insert(len(middle) // 2, MARK - 1)
            ids = prompt(self.head, self.documents, self.question())
            for name in CONFIGURATIONS:
                took = self.engine.generate(ids, options_of(name, ids))["seconds"]
                if repeat >= 0:
                    seconds[name].append(took)
        return seconds

    def retrieval(self) -> dict[str, list[float]]:
        """Return configuration -> seconds to the first token of a prompt with 8 of the 100 documents."""
        library = make_documents(LIBRARY, LIBRARY * MEAN_TOKENS, self.tokens)
        for first in track(range(0, LIBRARY, RETRIEVED), description="computing 100 documents"):
            ids = prompt(self.head, library[first : first + RETRIEVED], self.question())
            self.engine.generate(ids, options_of(BLOCK, ids))
        seconds: dict[str, list[float]] = {BLOCK: [], DENSE: []}
        for _ in track(range(self.repeats), description="8 of 100 documents"):
            ids = prompt(self.head, self.tokens.sample(library, RETRIEVED), self.question())
            for name, times in seconds.items():
                times.append(self.engine.generate(ids, options_of(name, ids))["seconds"])
        return seconds

    def decode(self) -> dict[str, list[float]]:
        """Return configuration -> seconds for each token behind the 16 documents."""
        seconds: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
        ids = prompt(self.head, self.documents, self.question())
        for repeat in track(range(-1, self.repeats), description="a token behind 16 documents"):
            for name in CONFIGURATIONS:
                options = options_of(name, ids)
                first = self.engine.generate(ids, options)["seconds"]
                many = self.engine.generate(ids, options, max_tokens=NEW_TOKENS)["seconds"]
                if repeat >= 0:
                    seconds[name].append((many - first) / (NEW_TOKENS - 1))
        return seconds


TITLES = {
    "edit": "first token after a document has grown by a token, s",
    "retrieval": "first token, 8 of 100 documents that are cached, s",
    "decode": "a token behind 16 documents, s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    arguments = ENGINE | {"enable_prefix_caching": True, "kv_cache_memory_bytes": 5 << 30, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        with Engine(model, **arguments) as engine:
            measurement = Measurement(engine, args.tokens, args.repeats)
            seconds = {
                "edit": measurement.edit(),
                "decode": measurement.decode(),
                "retrieval": measurement.retrieval(),
            }
    title = f"random Llama, 2 layers, float32, {args.tokens:,} tokens in {DOCUMENTS} documents"
    ours, shape = dict.fromkeys(seconds, BLOCK), {"digits": ".3g", "figsize": (6.5, 5)}
    report_medians("block_positions", title, seconds, ours, TITLES, **shape, query_tokens=QUERY_TOKENS)


if __name__ == "__main__":
    main()
