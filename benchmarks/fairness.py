"""Who waits while long prompts prefill: `python -m benchmarks.fairness`.

One engine, stepped in this process; beside one and three long prompts, dense and star: the time to first token of
short prompts that come at regular times, in the middle of a step as it happens, and the time between the tokens of a
request that decodes. Starling's scheduling, and vLLM's at its default and with long prompts capped, take turns in one
run, with the same prompts at the same times: vLLM's is the same scheduler with Starling's part taken out. Then pairs
of a request alone on the engine, with it and without. Writes results/fairness.json and .png; what was measured before
and is not now keeps its figures. Takes 3 minutes with --tokens 8192, 45 with prompts of 64k tokens.
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
from rich.table import Table

from benchmarks.engine import QUIET
from benchmarks.random_llama import make_random_llama
from benchmarks.report import put_row, ratio_interval, read_json, write_json
from benchmarks.star_ttft import ENGINE, QUERY_TOKENS, RANDOM_LLAMA

STEP = ENGINE["max_num_batched_tokens"]
SHORT, EVERY_SECONDS = 128, 0.83  # no multiple of a step
STAR = {"star": "on", "star_num_blocks": 16, "star_query_tokens": QUERY_TOKENS}
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
    sharing: Any
    count: int = 0

    @classmethod
    def start(cls, model: Path) -> Engine:
        from vllm import LLM

        arguments = ENGINE | {"max_num_seqs": 16, "kv_cache_memory_bytes": 4 << 30, "enable_prefix_caching": False}
        llm = LLM(str(model), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **arguments)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        return cls(llm, scheduler, scheduler.sharing)

    def schedule_as(self, name: str) -> None:
        threshold, adaptive = VLLM.get(name, (0, False))
        self.scheduler.sharing = self.sharing if name == OURS else None
        self.scheduler.scheduler_config.long_prefill_token_threshold = threshold
        self.scheduler.adaptive_long_prefill_threshold = adaptive

    def add(self, ids: list[int], max_tokens: int, options: dict[str, Any] | None = None) -> str:
        from vllm import SamplingParams

        self.count += 1
        name = str(self.count)
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=options or None)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, params)
        return name

    def step(self) -> set[str]:
        """Run one step; returns the requests that got a token."""
        return {output.request_id for output in self.llm.llm_engine.step()}

    def drain(self, request_ids: list[str]) -> None:
        self.llm.llm_engine.abort_request(request_ids)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()


def beside(engine: Engine, length: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds: short prompts' first tokens, the decoding request's pauses, and until the long prompts are done."""
    tokens = random.Random(length)
    draw = lambda size: [tokens.randrange(255) for _ in range(size)]  # noqa: E731
    chat = engine.add(draw(64), 100_000)
    for _ in range(3):
        engine.step()
    start = last = clock()
    waiting = {engine.add(draw(length), 1, options) for _ in range(count)}
    sent: dict[str, float] = {}
    first_tokens, pauses, steps, came = [], [], 0, 0
    while waiting:
        while (due := start + came * EVERY_SECONDS) <= clock():
            sent[engine.add(draw(SHORT), 1)] = due
            came += 1
        got = engine.step()
        now = clock()
        first_tokens += [now - sent.pop(name) for name in got & sent.keys()]
        if chat in got:
            pauses.append(now - last)
            last = now
        waiting -= got
        steps += 1
    seconds = clock() - start
    first_tokens += [clock() - at for at in sent.values()]
    engine.drain([chat, *sent])
    return {"short_ttft": first_tokens, "pauses": pauses, "long_seconds": seconds, "steps": steps}


def alone(engine: Engine, ids: list[int], options: dict[str, Any]) -> float:
    start = clock()
    name = engine.add(ids, 1, options)
    while name not in engine.step():
        pass
    return clock() - start


def summary(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Of all rounds together; the long prompts' throughput also of each."""
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


def what(result: dict[str, Any]) -> str:
    return f"{result['count']} x {result['tokens'] // 1024}k {result['kind']}"


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{what(result)}: seconds, and tokens of long prompts per second")
    for column in ("scheduling", "short TTFT median", "max", "decode pause median", "p99", "tokens/s"):
        table.add_column(column, justify="right")
    for name, row in result["rows"].items():
        values = [f"{row[key]:.3f}" for key in list(row)[:4]]
        table.add_row(name, *values, f"{row['long_tokens_per_second']:.0f}")
    Console().print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(3.2 * len(results), 5.2), sharey="row", squeeze=False)
    for column, result in enumerate(results):
        names = list(result["rows"])
        for row, (low, high, label) in enumerate(
            (("short_ttft_median", "short_ttft_max", "short TTFT"), ("pause_median", "pause_p99", "decode pause"))
        ):
            axis = axes[row][column]
            axis.bar(names, [result["rows"][name][high] for name in names], color="lightgrey")
            axis.bar(names, [result["rows"][name][low] for name in names])
            axis.set_yscale("log")
            axis.tick_params(axis="x", rotation=75, labelsize=7)
            axis.set_title(what(result) if row == 0 else "", fontsize=9)
            if column == 0:
                axis.set_ylabel(f"{label}, s: median, {'max' if row == 0 else 'p99'} grey", fontsize=8)
            if row == 0:
                axis.set_xticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="long prompts of 16k tokens instead of 64k")
    parser.add_argument("--tokens", type=int, help="of a long prompt")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="of long prompts")
    parser.add_argument("--against", nargs="*", choices=VLLM, default=list(VLLM), help="vLLM's settings beside")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 3], help="long prompts at a time")
    parser.add_argument("--rounds", type=int, default=1, help="of each setting, in turns")
    parser.add_argument("--pairs", type=int, default=8, help="of a request alone on the engine")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of this process on its core, not of the clock: on a machine that others use too",
    )
    args = parser.parse_args()
    global clock
    clock = time.process_time if args.cpu_time else time.perf_counter
    length = args.tokens or (16384 if args.quick else 65536)
    os.environ.update(QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    with tempfile.TemporaryDirectory() as directory:
        engine = Engine.start(make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA))
        alone(engine, [1] * 4096, {})
        names = (OURS, *args.against)
        turns = [name for turn in range(args.rounds) for name in (names[::-1] if turn % 2 else names)]
        for kind in args.kinds:
            for count in args.counts:
                runs: dict[str, list] = {name: [] for name in names}
                for name in track(turns, description=f"{count} x {length // 1024}k {kind}"):
                    engine.schedule_as(name)
                    runs[name].append(beside(engine, length, count, KINDS[kind]))
                rows = {name: summary(rounds, count * length) for name, rounds in runs.items()}
                keep({"count": count, "tokens": length, "kind": kind, "cpu_time": args.cpu_time, "rows": rows})
        pairs: dict[str, list[float]] = {OURS: [], "vLLM": []}
        tokens = random.Random(1)
        for number in range(args.pairs):
            ids = [tokens.randrange(255) for _ in range(8192)]
            for name in (OURS, "vLLM") if number % 2 else ("vLLM", OURS):
                engine.schedule_as(name)
                pairs[name].append(alone(engine, ids, STAR if number % 4 < 2 else {}))
    if args.pairs:
        ratio = ratio_interval(pairs["vLLM"], pairs[OURS])
        print(f"a request alone, Starling over vLLM: {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]")
        write_json(NAME, read_json(NAME) | {"alone_seconds": pairs, "alone_over_vllm": list(ratio)})


def keep(result: dict[str, Any]) -> None:
    """Show a result and write it, in the place of the one measured before."""

    def place(of: dict[str, Any]) -> tuple:
        return of["tokens"], of["kind"], of["count"]

    show(result)
    before = read_json(NAME)
    results = put_row(before.get("results", []), result, place)
    path = write_json(NAME, before | {"step_tokens": STEP, "results": results})
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
