"""Times without a bound: time to first token, dense and star, and the time of a token, plain and activated."""

from __future__ import annotations

import functools
from typing import Any

from starling.selftest.engine_run import EngineRun
from starling.selftest.prompts import make_prompt
from starling.selftest.result import Check, Result

LENGTHS = {True: (32_768, 131_072), False: (4_096,)}  # by whether there is a GPU
DECODED, DECODE_PROMPT, RUNS = 32, 512, 6  # the fastest run counts, as other programs slow the others down
BLOCK_FRACTION = 8  # of the prompt


def speed_checks(model: str, vocabulary: int, gpu: bool, **arguments: Any) -> list[Check]:
    """The measurements of one plain and one activated engine.

    Args:
        arguments: further arguments of vllm.LLM.
    """
    lengths = LENGTHS[gpu]
    engine = {"model": model, "dtype": "bfloat16" if gpu else "float32", "enforce_eager": not gpu} | arguments
    engine |= {"max_model_len": lengths[-1] + 1024, "max_num_batched_tokens": 8192 if gpu else 2048}
    decode = make_prompt(1, DECODE_PROMPT, vocabulary, max_tokens=DECODED, cold=True)
    batches = {f"decode {run}": [decode] for run in range(RUNS)}
    star_batches = dict(batches)
    for length in lengths:
        star = {"star": "on", "star_block_size": length // BLOCK_FRACTION, "star_query_tokens": 512}
        prompt = make_prompt(2, length, vocabulary, max_tokens=1, cold=True)
        star_batches |= {f"dense {length}": [prompt], f"star {length}": [prompt | {"star": star}]}
    plain = EngineRun(engine, batches)
    activated = EngineRun(engine | {"additional_config": {"starling": {}}}, star_batches)
    checks = [
        Check(f"speed: first token of {length:,} tokens, star", functools.partial(measure_ttft, activated, length))
        for length in lengths
    ]
    return [*checks, Check("speed: a token, activated", functools.partial(measure_decode, plain, activated))]


def measure_ttft(activated: EngineRun, length: int) -> Result:
    (dense,), (star,) = activated.outputs(f"dense {length}"), activated.outputs(f"star {length}")
    ratio = dense["ttft"] / star["ttft"]
    return Result(star["ttft"], None, "s", f"dense {dense['ttft']:.3g} s, {ratio:.2f} times star's; block of n/8")


def measure_decode(plain: EngineRun, activated: EngineRun) -> Result:
    ours, plains = (
        min(1000 * engine.outputs(f"decode {run}")[0]["seconds_per_token"] for run in range(RUNS))
        for engine in (activated, plain)
    )
    return Result(ours, None, "ms", f"plain vLLM {plains:.3g} ms, after {DECODE_PROMPT} tokens, fastest of {RUNS} runs")
