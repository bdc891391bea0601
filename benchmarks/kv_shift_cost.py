"""What the shift costs: a model with KV shifting attention against the same Llama without it, in vLLM.

One engine at a time, in turn, each started several times: a fresh process is some per cent faster or slower.

    python -m benchmarks.kv_shift_cost
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.dense_cost import ARGUMENTS, WORKLOADS
from benchmarks.engine import Engine
from benchmarks.random_kv_shift import TINY_LLAMA, make_random_kv_shift
from benchmarks.random_llama import make_random_llama
from benchmarks.report import ratio_interval, write_json

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
Seconds = dict[str, list[float]]


def run(model: Path, rounds: int, seed: int) -> Seconds:
    """Workload -> seconds of each round, on a fresh engine that has warmed up."""
    tokens = random.Random(seed)
    seconds: Seconds = {}
    with Engine(model, **ARGUMENTS) as engine:
        for workload, (prompt, new) in WORKLOADS.items():
            engine.generate([1] * prompt, max_tokens=new)
            prompts = [[tokens.randrange(256) for _ in range(prompt)] for _ in range(rounds)]
            seconds[workload] = [engine.generate(ids, max_tokens=new)["seconds"] for ids in prompts]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="after each start")
    options = parser.parse_args()
    seconds: dict[str, Seconds] = {name: {workload: [] for workload in WORKLOADS} for name in ("plain", "shifted")}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "plain": make_random_llama(Path(folder) / "plain", **SIZES),
            "shifted": make_random_kv_shift(Path(folder) / "shifted", TINY_LLAMA | SIZES),
        }
        for start in range(options.starts):
            for name, model in models.items():
                for workload, times in run(model, options.rounds, seed=start).items():
                    seconds[name][workload] += times
    ratios = {
        workload: ratio_interval(seconds["plain"][workload], seconds["shifted"][workload]) for workload in WORKLOADS
    }
    for workload, (median, lower, upper) in ratios.items():
        print(f"{workload}: {median:.3f} times without the shift, 95 % {lower:.3f} to {upper:.3f}")
    print(write_json("kv_shift_cost", {"sizes": SIZES, "seconds": seconds, "ratio_to_plain": ratios}))


if __name__ == "__main__":
    main()
