"""What the shift costs: a model with KV shifting attention against the same Llama without it, in vLLM.

Both engines are alive at once and run in turn, so that what else the machine does falls on both.

    python -m benchmarks.kv_shift_cost
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from benchmarks.dense_cost import ARGUMENTS, WORKLOADS, interleave
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    seconds: dict[str, dict[str, list[float]]] = {name: {"plain": [], "shifted": []} for name in WORKLOADS}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        models = {
            "plain": make_random_llama(Path(name) / "plain", **SIZES),
            "shifted": make_random_kv_shift(Path(name) / "shifted", TINY_LLAMA | SIZES),
        }
        engines = {name: stack.enter_context(Engine(model, **ARGUMENTS)) for name, model in models.items()}
        for workload, (prompt, new) in WORKLOADS.items():
            interleave(engines, prompt, new, rounds, seconds[workload], seed=0)
    ratios = {workload: ratio_interval(times["plain"], times["shifted"]) for workload, times in seconds.items()}
    for workload, (median, lower, upper) in ratios.items():
        print(f"{workload}: {median:.3f} times without the shift, 95 % {lower:.3f} to {upper:.3f}")
    print(write_json("kv_shift_cost", {"sizes": SIZES, "seconds": seconds, "ratio_to_plain": ratios}))


if __name__ == "__main__":
    main()
