"""The cost of the shift: a model with KV shifting attention against the same Llama without it, in vLLM.

    python -m benchmarks.kv_shift.cost

One engine runs at a time. Each is started several times, because processes differ in speed by some per cent. The
benchmark measures prefill, decode, and the tokens that fit a KV cache of 1 GiB. It writes results/kv_shift_cost.json
and .png.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.dense_cost import ARGUMENTS, WORKLOADS, plot
from benchmarks.engine import Engine
from benchmarks.kv_shift.random_model import TINY_LLAMA, make_random_kv_shift
from benchmarks.random_llama import make_random_llama
from benchmarks.report import OUT, write_json
from starling.lab.statistics import ratio_interval

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
BYTES = 1 << 30
Seconds = dict[str, list[float]]
"""Seconds of each round, by workload."""


def run(model: Path, rounds: int, seed: int) -> tuple[Seconds, int]:
    """Return the seconds on a new engine after warm-up, and the tokens that fit its cache."""
    tokens = random.Random(seed)
    seconds: Seconds = {}
    with Engine(model, **ARGUMENTS | {"kv_cache_memory_bytes": BYTES}) as engine:
        for workload, (prompt, new) in WORKLOADS.items():
            engine.generate([1] * prompt, max_tokens=new)
            prompts = [[tokens.randrange(256) for _ in range(prompt)] for _ in range(rounds)]
            seconds[workload] = [engine.generate(ids, max_tokens=new)["seconds"] for ids in prompts]
        return seconds, engine.cache_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4, help="starts of each engine")
    parser.add_argument("--rounds", type=int, default=6, help="rounds after each start")
    options = parser.parse_args()
    seconds: dict[str, Seconds] = {name: {workload: [] for workload in WORKLOADS} for name in ("plain", "shifted")}
    cache_tokens: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "plain": make_random_llama(Path(folder) / "plain", **SIZES),
            "shifted": make_random_kv_shift(Path(folder) / "shifted", TINY_LLAMA | SIZES),
        }
        for start in range(options.starts):
            for name, model in models.items():
                times, cache_tokens[name] = run(model, options.rounds, seed=start)
                for workload in WORKLOADS:
                    seconds[name][workload] += times[workload]
    ratios = {
        workload: ratio_interval(seconds["plain"][workload], seconds["shifted"][workload]) for workload in WORKLOADS
    }
    for workload, (median, lower, upper) in ratios.items():
        print(f"{workload}: {median:.3f} times the time without the shift, 95 % {lower:.3f} to {upper:.3f}")
    per_token = {name: BYTES / tokens for name, tokens in cache_tokens.items()}
    for name, tokens in cache_tokens.items():
        print(f"{name}: {tokens:,} tokens in 1 GiB, {per_token[name]:,.0f} bytes per token")
    cache = {"tokens_in_1_gib": cache_tokens, "bytes_per_token": per_token}
    path = write_json("kv_shift_cost", {"sizes": SIZES, "seconds": seconds, "ratio_to_plain": ratios} | cache)
    figures = {workload: {"KV shifting": interval} for workload, interval in ratios.items()}
    plot(figures, OUT / "kv_shift_cost.png", baseline="the same Llama")
    print(f"{path} and {OUT / 'kv_shift_cost.png'}")


if __name__ == "__main__":
    main()
