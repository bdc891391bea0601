"""Starling's paged attention op and vLLM's on a CPU: `python -m benchmarks.kernels.cpu_kernels`.

Each case runs the two ops in turn on the same cache, many times, in one process with a fixed number of threads.
Starling's op also returns the log-sum-exp. Writes results/cpu_kernels.json and .png: the seconds of every run, the
ratio of the best runs, the median ratio of adjacent runs, and the bytes of keys and values read per second. For
comparison, they also hold the bytes per second that a plain copy and a plain sum read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import _custom_ops as ops

from benchmarks.report import OUT, saved_figure, write_json
from starling.attention_backends.kernels.contract import Layout, Operands, as_fp8
from starling.attention_backends.kernels.cpu.paged_op import Processor, built_op, paged_attention, select_op
from starling.lab.statistics import median_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A batch of ``rows`` rows, each with ``queries`` query tokens and ``keys`` keys; heads have ``size`` elements."""

    rows: int
    queries: int
    keys: int
    dtype: str
    size: int
    heads: int = 8
    kv_heads: int = 8
    page_size: int = 128
    kv_cache_dtype: str = "auto"

    @property
    def name(self) -> str:
        cache = "" if self.kv_cache_dtype == "auto" else f" {self.kv_cache_dtype}"
        pages = "" if self.page_size == 128 else f" pages of {self.page_size}"
        return (
            f"{self.rows} x {self.queries} on {self.keys:,} {self.dtype}{cache} "
            f"{self.heads}/{self.kv_heads} heads of {self.size}{pages}"
        )


TARGETS = [
    Case(rows, queries, keys, dtype, size, kv_heads=kv_heads)
    for dtype, size, kv_heads in itertools.product(("bf16", "fp32"), (64, 128), (8, 2))
    for rows, queries, keys in ((1, 1, 32768), (8, 1, 4096), (1, 256, 32768))
]
OTHERS = [
    Case(1, 1, 32768, "bf16", 128, kv_cache_dtype="fp8_e4m3"),
    Case(8, 1, 4096, "bf16", 64, page_size=32),
    Case(8, 1, 4096, "fp32", 64, page_size=32),
    Case(8, 1, 4096, "fp16", 64),
    Case(1, 1, 16384, "fp32", 256),
    *(Case(1, 16, 4096, dtype, 64) for dtype in ("bf16", "fp32")),
    *(Case(1, 64, 4096, dtype, 128) for dtype in ("bf16", "fp32")),
    *(Case(1, 512, 512, dtype, 64) for dtype in ("bf16", "fp32", "fp16")),
    *(Case(1, 2048, 2048, dtype, 128, kv_heads=2) for dtype in ("bf16", "fp32")),
    *(Case(16, 1, 200, dtype, 64, kv_heads=2) for dtype in ("bf16", "fp32")),
    *(Case(16, 1, 200, dtype, 64) for dtype in ("bf16", "fp32")),
]


def make_runs(case: Case) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return the two ops on the same operands, and the bytes of keys and values that each reads.

    Their results must agree.
    """
    torch.manual_seed(0)
    dtype, columns = DTYPES[case.dtype], -(-case.keys // case.page_size)
    num_pages, quantised = case.rows * columns, case.kv_cache_dtype != "auto"
    cache = torch.randn(num_pages, case.kv_heads, 2 * case.page_size, case.size).to(dtype)
    if quantised:
        cache = as_fp8(torch.empty(cache.shape, dtype=torch.uint8), case.kv_cache_dtype).copy_(cache).view(torch.uint8)
    key_cache, value_cache = cache.chunk(2, dim=2)
    query = torch.randn(case.rows * case.queries, case.heads, case.size).to(dtype)
    table = torch.randperm(num_pages, dtype=torch.int32).view(case.rows, columns)
    starts = torch.arange(case.rows + 1, dtype=torch.int32) * case.queries
    lens = torch.full((case.rows,), case.keys, dtype=torch.int32)
    scale, ours, theirs = case.size**-0.5, torch.empty_like(query), torch.empty_like(query)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.rows, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.size, seq_lens=lens,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=True,
        kv_cache_dtype=case.kv_cache_dtype,
    )  # fmt: skip

    def starling() -> Any:
        keys, values = (as_fp8(c, case.kv_cache_dtype) if quantised else c for c in (key_cache, value_cache))
        return paged_attention(
            Operands(query, keys, values, table, starts, lens, scale=scale, out=ours, layout=Layout.CPU)
        )

    def vllm() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=theirs, query_start_loc=starts,
            seq_lens=lens, scale=scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table,
            softcap=0.0, scheduler_metadata=plan, s_aux=None, kv_cache_dtype=case.kv_cache_dtype,
        )  # fmt: skip

    starling(), vllm()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)
    return {"starling": starling, "vllm": vllm}, 2 * case.rows * case.keys * case.kv_heads * case.size * cache.itemsize


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, budget: float) -> dict[str, Any]:
    """Run the ops in turn for about ``budget`` seconds, at least five times each."""
    runs, read = make_runs(case)
    once = sum(seconds_of(run) for run in runs.values())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(5, min(40, int(budget / once)))):
        for name, run in runs.items():
            seconds[name].append(round(seconds_of(run), 7))
    best = {name: min(times) for name, times in seconds.items()}
    floats = 4 * case.rows * case.queries * (case.keys - (case.queries - 1) / 2) * case.heads * case.size
    group, dtype = case.heads // case.kv_heads, DTYPES[case.dtype]
    return {
        "case": case.name,
        **asdict(case),
        "seconds": seconds,
        "best_ratio": best["vllm"] / best["starling"],
        "median_ratio": median_ratio(seconds["vllm"], seconds["starling"]),
        "gigabytes_a_second": read / best["starling"] / 1e9,
        "gigaflops": floats / best["starling"] / 1e9,
        "chosen": str(select_op(Processor.detect(), dtype, queries=case.queries, keys=case.keys, group=group)),
    }


def memory() -> dict[str, float]:
    """Return the GB per second that a copy of 256 MB reads (it writes as many), and that a sum over 256 MB reads."""
    source = torch.ones(1 << 26)
    target = torch.zeros_like(source)
    size = source.numel() * source.itemsize
    return {
        "copy_reads": size / min(seconds_of(lambda: target.copy_(source)) for _ in range(8)) / 1e9,
        "sum_reads": size / min(seconds_of(source.sum) for _ in range(8)) / 1e9,
    }


def show(results: list[dict[str, Any]], bandwidth: dict[str, float], threads: int) -> None:
    copy, total = bandwidth["copy_reads"], bandwidth["sum_reads"]
    table = Table(title=f"{threads} thread(s); a copy reads {copy:.1f} GB/s, a sum {total:.1f} GB/s")
    for column in ("case", "vLLM ms", "Starling ms", "best", "median", "GB/s", "GFLOP/s", "chosen"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        table.add_row(
            row["case"],
            *(f"{1e3 * min(row['seconds'][name]):.2f}" for name in ("vllm", "starling")),
            f"{row['best_ratio']:.2f}x",
            f"{row['median_ratio']:.2f}x",
            f"{row['gigabytes_a_second']:.1f}",
            f"{row['gigaflops']:.0f}",
            row["chosen"],
        )
    Console(width=150).print(table)


def plot(results: list[dict[str, Any]], threads: int, path: Path) -> None:
    with saved_figure(path, figsize=(8, 0.2 * len(results) + 1)) as (_, axis):
        names = [row["case"] for row in results]
        colours = ["C0" if row["chosen"] == "starling" else "C7" for row in results]
        axis.barh(names, [row["median_ratio"] for row in results], color=colours)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel(
            f"vLLM's time over Starling's, median, {threads} thread(s); grey: `select_op` selects vLLM's", fontsize=8
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per case")
    parser.add_argument("--targets-only", action="store_true", help="run the target cases only: decode and extend")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if built_op() is None:
        parser.error("the op can't be built here")
    bandwidth, load = memory(), os.getloadavg()[0]
    cases = TARGETS if args.targets_only else TARGETS + OTHERS
    results = [measure(case, args.budget) for case in track(cases, description="cases")]
    show(results, bandwidth, args.threads)
    decode = [row["best_ratio"] for row in results if row["queries"] == 1 and row["keys"] == 32768]
    print(f"decode on 32k keys: {min(decode):.2f}x to {max(decode):.2f}x, median {statistics.median(decode):.2f}x")
    name = "cpu_kernels" if args.threads == 1 else f"cpu_kernels_{args.threads}_threads"
    print(
        write_json(
            name, {"threads": args.threads, "load_average_before": load, "memory": bandwidth, "results": results}
        )
    )
    plot(results, args.threads, OUT / f"{name}.png")


if __name__ == "__main__":
    main()
