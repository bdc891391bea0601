"""Cost of a token with an adapter: `python -m benchmarks.adapter_cost MODEL ADAPTER`.

Two servers, one with --star-adapter and one without, are asked in turns about the same documents, of which nothing is
cached: with the adapter; on that server without it, where vLLM has LoRA in its layers too; and on the other server.
Writes the seconds to the first token, and from each token to the next, to results/adapter_cost_MODEL.json and .png.
Takes 3 minutes with the demo model.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import plot_medians, ratios_over, saved_figure, write_json
from examples.completions import Completions
from examples.server import serving
from examples.stdlib_documents import make_documents

WITH, OFF, WITHOUT = "adapter", "adapter off", "no adapter"
DOCUMENTS, CHARACTERS, TOKENS = 8, 1000, 65


def prompt_of(number: int) -> tuple[list[str], str]:
    """Return documents, in another order each time, and a question."""
    documents = make_documents(CHARACTERS)[number * DOCUMENTS : (number + 1) * DOCUMENTS]
    return documents, "Which functions do the documents describe?"


def ask(client: Completions, number: int, star: dict[str, Any], salt: str) -> tuple[float, float]:
    """Return (seconds to the first token, from each token to the next)."""
    documents, question = prompt_of(number)
    head = "You answer from documents, and say nothing else. " * 6
    pieces = [client.tokenize(text) for text in (head, *documents, question)]
    starts = [sum(map(len, pieces[:place])) for place in range(1, len(pieces))]
    star = {"star": "on", "star_segments": starts} | star
    began = time.perf_counter()
    ids: Any = [token for piece in pieces for token in piece]
    answer = client.ask(ids, star, max_tokens=TOKENS, ignore_eos=True, cache_salt=salt)
    return answer.seconds, (time.perf_counter() - began - answer.seconds) / (TOKENS - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="servers with --enforce-eager")
    args = parser.parse_args()
    options = ["--preset", "rag", "--max-model-len", "4096", *(["--enforce-eager"] if args.eager else [])]
    first: dict[str, list[float]] = {WITH: [], OFF: [], WITHOUT: []}
    each: dict[str, list[float]] = {WITH: [], OFF: [], WITHOUT: []}
    with ExitStack() as stack:
        log = Path("build")
        with_it, without = (
            Completions(stack.enter_context(serving(args.model, *options, *more, log=log / f"{name}.log")).http)
            for name, more in (("with", ["--star-adapter", str(args.adapter)]), ("without", []))
        )
        ways = {WITH: (with_it, {}), OFF: (with_it, {"star_adapter": "off"}), WITHOUT: (without, {})}
        for number in track(range(args.rounds + 1), description="rounds"):
            for name, (client, star) in ways.items():
                found = ask(client, number % 4, star, f"{name} {number}")
                if number:  # the first round warms up
                    first[name].append(found[0])
                    each[name].append(found[1])
    ratios = {"first": ratios_over(first, WITHOUT), "each": ratios_over(each, WITHOUT)}
    table = Table("", "first token", "over no adapter", "each token", "over no adapter")
    for name in (WITH, OFF):
        shown = ["{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratios[kind][name]) for kind in ("first", "each")]
        seconds = f"{median(first[name]):.3f} s", f"{1000 * median(each[name]):.1f} ms"
        table.add_row(name, seconds[0], shown[0], seconds[1], shown[1])
    Console(width=120).print(table)
    result = {"eager": args.eager, "documents": DOCUMENTS, "tokens": TOKENS} | {"first": first, "each": each}
    result["ratios"] = ratios
    path = write_json(f"adapter_cost_{args.model.name}{'_eager' if args.eager else ''}", result)
    with saved_figure(path.with_suffix(".png"), 1, 2, figsize=(9, 2.4)) as (_, (left, right)):
        plot_medians(left, first, ".2f")
        plot_medians(right, each, ".4f")
        left.set_xlabel("seconds to the first token")
        right.set_xlabel("seconds from each token to the next")
    print(path)


if __name__ == "__main__":
    main()
