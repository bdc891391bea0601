"""The Triton kernels and torch's SDPA on a GPU, with 32k to 1M keys: `python -m benchmarks.kernels.gpu_kernels`.

One row of bfloat16 has its pages in random order; SDPA gets the same keys in one contiguous tensor. Decode is one
query, reported as a fraction of the bandwidth that a copy reaches on the card. Prefill is the last chunk of a prompt,
reported as a fraction of the rate of a large matrix product. Writes results/gpu_kernels.json and .png. Exits with 2
where there is no GPU, and with 1 where the two outputs differ by more than rounding. Needs 14 GB of GPU memory at 1M
keys.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.bias import causal_lower_right

from benchmarks.report import saved_figure, write_json
from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.triton import paged as triton_attention

HEADS, KV_HEADS, SIZE, PAGE_SIZE = 32, 8, 128, 16
CHUNK = 4096
ELEMENT_BYTES = 2
# Maximum relative RMS difference of two bfloat16 results: a little over two ulps.
ROUNDING = 1e-2


def kv_bytes(keys: int) -> int:
    """Return the bytes that decode must read: K and V of all keys."""
    return 2 * keys * KV_HEADS * SIZE * ELEMENT_BYTES


def attention_flops(queries: int, keys: int) -> int:
    """Return the operations of causal attention aligned bottom-right.

    There are 2 products, so 4 operations per query-key pair, head and dimension.
    """
    pairs = queries * keys - queries * (queries - 1) // 2
    return 4 * pairs * HEADS * SIZE


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of ``repeats`` runs, after two runs that compile and warm up."""
    call(), call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def card_rates(device: str, repeats: int) -> tuple[float, float]:
    """Return the measured rates of the card: bytes/s of a copy, operations/s of a bfloat16 matrix product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / seconds(lambda: target.copy_(source), repeats)
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return bandwidth, 2 * 8192**3 / seconds(lambda: matrix @ matrix, repeats)


def measure(queries: int, keys: int, device: str, repeats: int) -> dict[str, Any]:
    """Return the seconds of the kernel and of SDPA, and the relative RMS difference of their outputs."""
    torch.manual_seed(0)
    num_pages = -(-keys // PAGE_SIZE)
    key_cache, value_cache = torch.randn(2, num_pages, PAGE_SIZE, KV_HEADS, SIZE, device=device, dtype=torch.bfloat16)
    query = torch.randn(queries, HEADS, SIZE, device=device, dtype=torch.bfloat16)
    table = torch.randperm(num_pages, device=device, dtype=torch.int32)[None]
    starts, lens = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, queries], [keys]))
    key, value = (
        cache[table[0].long()].flatten(0, 1)[None, :keys].transpose(1, 2) for cache in (key_cache, value_cache)
    )
    key, value = key.contiguous(), value.contiguous()
    attend = triton_attention.decode_attention if queries == 1 else triton_attention.prefill_attention

    def triton() -> torch.Tensor:
        operands = Operands(query, key_cache, value_cache, table, starts, lens, scale=SIZE**-0.5)
        return attend(operands)[0]

    def sdpa() -> torch.Tensor:
        mask = None if queries == 1 else causal_lower_right(queries, keys)
        return torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, enable_gqa=True
        )

    want = sdpa()[0].transpose(0, 1).float()
    error = ((triton().float() - want).square().mean() / want.square().mean()).sqrt().item()
    return {"keys": keys, "triton": seconds(triton, repeats), "sdpa": seconds(sdpa, repeats), "error": error}


def run(lengths: list[int], device: str, repeats: int) -> dict[str, Any]:
    bandwidth, rate = card_rates(device, repeats)
    decode, prefill = [], []
    for keys in lengths:
        for queries, rows, work, peak in (
            (1, decode, kv_bytes(keys), bandwidth),
            (CHUNK, prefill, attention_flops(CHUNK, keys), rate),
        ):
            row = measure(queries, keys, device, repeats)
            shares = {f"{name}_share": work / row[name] / peak for name in ("triton", "sdpa")}
            rows.append(row | shares)
    return {"bytes_per_second": bandwidth, "operations_per_second": rate, "decode": decode, "prefill": prefill}


def show(result: dict[str, Any]) -> None:
    for name, of in (("decode", "the bandwidth"), ("prefill", "the matrix rate")):
        table = Table("keys", "Triton ms", "SDPA ms", "Triton", "SDPA", "difference", title=f"{name}, fraction of {of}")
        for row in result[name]:
            table.add_row(
                f"{row['keys']:,}",
                *(f"{1000 * row[kernel]:.3f}" for kernel in ("triton", "sdpa")),
                *(f"{row[f'{kernel}_share']:.0%}" for kernel in ("triton", "sdpa")),
                f"{row['error']:.1e}",
            )
        Console().print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    with saved_figure(path, 1, 2, figsize=(9, 4.2), sharey=True) as (figure, axes):
        panels = (("decode", "fraction of a copy's bandwidth"), ("prefill", "fraction of a matrix product's rate"))
        for axis, (name, label) in zip(axes, panels, strict=True):
            lengths = [row["keys"] for row in result[name]]
            for kernel, legend in (("triton", "Triton, paged"), ("sdpa", "SDPA, contiguous")):
                axis.plot(lengths, [row[f"{kernel}_share"] for row in result[name]], marker="o", label=legend)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
            axis.set_ylim(bottom=0)
            axis.set_xlabel("keys")
            axis.set_title(f"{name}: {label}", fontsize=10)
        axes[0].legend()
        figure.suptitle(result["device"], fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1 << power for power in range(15, 21)])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: these kernels can be timed on a GPU only", file=sys.stderr)
        sys.exit(2)
    result = {"device": torch.cuda.get_device_name()} | run(args.lengths, "cuda", args.repeats)
    show(result)
    path = write_json("gpu_kernels", result)
    plot(result, path.with_suffix(".png"))
    print(path)
    wrong = [row for row in result["decode"] + result["prefill"] if not row["error"] < ROUNDING]
    if wrong:
        print(f"Triton and SDPA differ by more than {ROUNDING} at: {wrong}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
