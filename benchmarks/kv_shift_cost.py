"""What the shift costs: a model with KV shifting attention against the same Llama without, in vLLM.

Prefill (time to the first token of a long prompt) and decode (time of each further token), both engines alive at
once and timed in turn, so that what else the machine does falls on both.

    python -m benchmarks.kv_shift_cost
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

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
ENGINE: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_batched_tokens": 1024}
# Both engines share the machine: half its memory's worth of cache would be too much for a small one.
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
PROMPT, NEW, ROUNDS = 2048, 64, 12


def measure(engine: Engine, seed: int) -> dict[str, float]:
    """Seconds of a prefill and of a decoded token, of a prompt that the engine has not seen."""
    tokens = random.Random(seed)
    ids = [tokens.randrange(256) for _ in range(PROMPT)]
    first = engine.generate(ids, max_tokens=1)["seconds"]
    whole = engine.generate(ids, max_tokens=1 + NEW)["seconds"]
    return {"prefill": first, "decode": (whole - first) / NEW}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = make_random_llama(folder / "llama", **SIZES)
        shifted = make_random_kv_shift(folder / "shifted", TINY_LLAMA | SIZES)
        with Engine(plain, env=ENV, **ENGINE) as without, Engine(shifted, env=ENV, **ENGINE) as with_shift:
            pairs = [(measure(without, seed), measure(with_shift, seed)) for seed in range(ROUNDS + 1)][1:]
    result: dict[str, Any] = {"sizes": SIZES, "engine": ENGINE, "prompt": PROMPT, "new": NEW, "rounds": ROUNDS}
    for phase in ("prefill", "decode"):
        before, after = ([times[phase] for times in side] for side in zip(*pairs, strict=True))
        ratio, lower, upper = ratio_interval(before, after)
        result[phase] = {"without": before, "with": after, "ratio": ratio, "interval": [lower, upper]}
        print(f"{phase}: {ratio:.3f} times without the shift, 95 % {lower:.3f} to {upper:.3f}")
    write_json("kv_shift_cost", result)


if __name__ == "__main__":
    main()
