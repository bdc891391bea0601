"""Latency of other requests while long prompts prefill: `python -m benchmarks.fairness`.

One engine runs in this process with one or three long prompts, dense or star. The benchmark measures the time to first
token of short prompts, which arrive at regular times and so at any moment of a step, and the time between the tokens of
a request that decodes. Starling's scheduling, vLLM's default, and vLLM with bounded chunks of long prompts take turns,
with the same prompts at the same times. vLLM's scheduling is the same scheduler without Starling's limiter. Writes
results/fairness.json and .png; rows that a run does not measure keep their figures. Takes 3 minutes with --tokens 8192,
45 with prompts of 64k tokens.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.engine import QUIET
from benchmarks.random_llama import make_random_llama
from benchmarks.report import legend_below, numbers_table, plot_two_times, saved_figure, write_row
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA
from starling.features.fairness.core import PrefillLimiter

STEP = ENGINE["max_num_batched_tokens"]
SHORT, EVERY_SECONDS = 128, 0.83  # not a multiple of a step's time
STAR = {"star": "on", "star_block_size": "n/16", "star_overlap_size": 0, "star_query_tokens": QUERY_TOKENS}
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "star": STAR}
NAME, OURS = "fairness", "Starling"
# (long_prefill_token_threshold, whether it adapts to the number of requests)
VLLM: dict[str, tuple[int, bool]] = {
    "vLLM": (0, False),
    "vLLM, threshold 512": (512, False),
    "vLLM, threshold 128": (128, False),
    "vLLM, adaptive threshold": (1, True),
}

clock = time.perf_counter
"""Or time.process_time: the engine computes on one core, in this process."""


@dataclass
class Engine:
    """An LLM whose engine core lives in this process."""

    llm: Any
    scheduler: Any
    parts: list[Any]
    count: int = 0

    @classmethod
    def start(cls, model: Path) -> Engine:
        from vllm import LLM

        arguments = ENGINE | {"max_num_seqs": 16, "kv_cache_memory_bytes": 4 << 30, "enable_prefix_caching": False}
        llm = LLM(str(model), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **arguments)
        client: Any = llm.llm_engine.engine_core
        scheduler = client.engine_core.scheduler
        return cls(llm, scheduler, scheduler.parts)

    def schedule_as(self, name: str) -> None:
        """Use Starling's scheduling, or one of VLLM, from the next step on."""
        threshold, adaptive = VLLM.get(name, (0, False))
        self.scheduler.use_parts(part for part in self.parts if name == OURS or not isinstance(part, PrefillLimiter))
        self.scheduler.scheduler_config.long_prefill_token_threshold = threshold
        self.scheduler.adaptive_long_prefill_threshold = adaptive

    def add(self, ids: list[int], max_tokens: int, options: dict[str, Any] | None = None) -> str:
        """Add a request; returns its id."""
        from vllm import SamplingParams

        self.count += 1
        name = str(self.count)
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=options or None)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def step(self) -> set[str]:
        """Run one step; returns the ids of the requests that got a token."""
        return {output.request_id for output in self.llm.llm_engine.step()}

    def drain(self, request_ids: list[str]) -> None:
        """Abort these requests, and step until no request is left."""
        self.llm.llm_engine.abort_request(request_ids)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()


def draw_ids(tokens: random.Random, size: int) -> list[int]:
    return [tokens.randrange(255) for _ in range(size)]


def time_beside_long_prompts(engine: Engine, length: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Run ``count`` long prompts beside short ones and a request that decodes.

    Returns:
        Seconds to the first token of each short prompt, between the tokens of the request that decodes, and until the
        long prompts are prefilled; and the number of steps.
    """
    tokens = random.Random(length)
    chat = engine.add(draw_ids(tokens, 64), 100_000)
    for _ in range(3):
        engine.step()
    start = last = clock()
    waiting = {engine.add(draw_ids(tokens, length), 1, options) for _ in range(count)}
    arrivals: dict[str, float] = {}
    first_tokens, pauses, steps, arrived = [], [], 0, 0
    while waiting:
        while (due := start + arrived * EVERY_SECONDS) <= clock():
            arrivals[engine.add(draw_ids(tokens, SHORT), 1)] = due
            arrived += 1
        got = engine.step()
        now = clock()
        first_tokens += [now - arrivals.pop(name) for name in got & arrivals.keys()]
        if chat in got:
            pauses.append(now - last)
            last = now
        waiting -= got
        steps += 1
    seconds = clock() - start
    first_tokens += [clock() - arrival for arrival in arrivals.values()]
    engine.drain([chat, *arrivals])
    return {"short_ttft": first_tokens, "pauses": pauses, "long_seconds": seconds, "steps": steps}


def summary(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return the figures of all rounds together, and the throughput of the long prompts in each round.

    Args:
        tokens: tokens of the long prompts of one round.
    """
    first_tokens = np.concatenate([run["short_ttft"] for run in rounds])
    pauses = np.concatenate([run["pauses"] for run in rounds])
    return {
        "short_ttft_median": float(np.median(first_tokens)),
        "short_ttft_max": float(np.max(first_tokens)),
        "pause_median": float(np.median(pauses)),
        "pause_p99": float(np.quantile(pauses, 0.99)),
        "long_tokens_per_second": tokens * len(rounds) / sum(run["long_seconds"] for run in rounds),
        "of_each_round": [tokens / run["long_seconds"] for run in rounds],
        "steps": rounds[0]["steps"],
    }


def label(result: dict[str, Any]) -> str:
    return f"{result['count']} x {result['tokens'] // 1024}k {result['kind']}"


def show(result: dict[str, Any]) -> None:
    columns = ("scheduling", "short TTFT median", "max", "decode pause median", "p99", "tokens/s")
    table = numbers_table(f"{label(result)}: seconds, and tokens of long prompts per second", columns)
    for name, row in result["rows"].items():
        values = [f"{row[key]:.3f}" for key in list(row)[:4]]
        table.add_row(name, *values, f"{row['long_tokens_per_second']:.0f}")
    Console().print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    panels = (
        ("short_ttft_median", "short_ttft_max", "seconds to a short prompt's first token", "the latest"),
        ("pause_median", "pause_p99", "seconds between two tokens of an answer", "one in a hundred is later"),
    )
    shape = {"figsize": (10, 1 + 1.7 * len(results)), "sharey": True, "sharex": "col", "squeeze": False}
    with saved_figure(path, len(results), 2, **shape) as (figure, axes):
        for row, result in zip(axes, results, strict=True):
            for axis, (low, high, _, _) in zip(row, panels, strict=True):
                values = {name: (found[low], found[high]) for name, found in result["rows"].items()}
                prompts = f"{result['count']} long prompt{'s' if result['count'] > 1 else ''}, {result['kind']}"
                plot_two_times(axis, values, f"beside {prompts}")
        for axis, (_, _, quantity, late) in zip(axes[-1], panels, strict=True):
            axis.set_xlabel(quantity, fontsize=9)
            legend_below(axis, "median", late)
        figure.suptitle("Short requests beside long prompts, by who schedules")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a long prompt (%(default)s)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of long prompts")
    parser.add_argument("--against", nargs="*", choices=VLLM, default=list(VLLM), help="vLLM's settings to measure")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 3], help="concurrent long prompts")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each setting, in turns")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU seconds of this process, not wall time: for a machine with other load",
    )
    args = parser.parse_args()
    global clock
    clock = time.process_time if args.cpu_time else time.perf_counter
    os.environ.update(QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    with tempfile.TemporaryDirectory() as directory:
        engine = Engine.start(make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA))
        engine.add([1] * 4096, 1)
        engine.drain([])
        names = (OURS, *args.against)
        turns = [name for turn in range(args.rounds) for name in (names[::-1] if turn % 2 else names)]
        for kind in args.kinds:
            for count in args.counts:
                runs: dict[str, list] = {name: [] for name in names}
                for name in track(turns, description=f"{count} x {args.tokens // 1024}k {kind}"):
                    engine.schedule_as(name)
                    runs[name].append(time_beside_long_prompts(engine, args.tokens, count, KINDS[kind]))
                rows = {name: summary(rounds, count * args.tokens) for name, rounds in runs.items()}
                report({"count": count, "tokens": args.tokens, "kind": kind, "cpu_time": args.cpu_time, "rows": rows})


def report(result: dict[str, Any]) -> None:
    """Print a result, write it to the JSON file and plot all results of that file."""
    show(result)
    results, path = write_row(NAME, "results", result, ("tokens", "kind", "count"), step_tokens=STEP)
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
