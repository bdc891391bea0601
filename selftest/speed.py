"""Times without a bound: time to first token, dense and star, and the time of a token, plain and activated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from starling.selftest.engine_run import EngineRun
from starling.selftest.prompts import make_prompt
from starling.selftest.result import Check, Result, Skip

LENGTHS = {True: (32_768, 131_072), False: (4_096,)}  # by whether there is a GPU
DECODED, DECODE_PROMPT, RUNS = 32, 512, 6  # the fastest run counts, as other programs slow the others down
DECODE_LENGTH = DECODE_PROMPT + DECODED
BLOCK_FRACTION = 8  # of the prompt
STEP = 1024  # prompts that are shortened have a multiple of this, of which an eighth is whole KV pages
SHORTEST = 2 * STEP  # a shorter prefill has too little attention to show what star saves


def lengths_within(lengths: Sequence[int], max_length: int) -> dict[int, int | None]:
    """The prompts to measure instead of those of ``lengths`` tokens, for a model that takes ``max_length`` tokens.

    One token is left for the output.

    Args:
        lengths: ascending.

    Returns:
        Each length -> the same, or the longest one that fits; None where that is too short, or is another's already.
    """
    found: dict[int, int | None] = {}
    for length in lengths:
        fits = length if length < max_length else (max_length - 1) // STEP * STEP
        found[length] = fits if fits >= SHORTEST and fits not in found.values() else None
    return found


def speed_checks(model: str, vocabulary: int, max_length: int, gpu: bool, **arguments: Any) -> list[Check]:
    """The measurements of one plain and one activated engine.

    Args:
        max_length: tokens that the model takes.
        arguments: further arguments of vllm.LLM.
    """
    lengths = lengths_within(LENGTHS[gpu], max_length)
    measured = [length for length in lengths.values() if length is not None]
    engine = {"model": model, "dtype": "bfloat16" if gpu else "float32", "enforce_eager": not gpu} | arguments
    engine |= {"max_model_len": min(max([*measured, DECODE_LENGTH]) + STEP, max_length)}
    engine |= {"max_num_batched_tokens": 8192 if gpu else 2048}
    decode = make_prompt(1, DECODE_PROMPT, vocabulary, max_tokens=DECODED, cold=True)
    batches = {f"decode {run}": [decode] for run in range(RUNS)} if max_length >= DECODE_LENGTH else {}
    star_batches = dict(batches)
    for length in measured:
        star = {"star": "on", "star_block_size": length // BLOCK_FRACTION, "star_query_tokens": 512}
        prompt = make_prompt(2, length, vocabulary, max_tokens=1, cold=True)
        star_batches |= {f"dense {length}": [prompt], f"star {length}": [prompt | {"star": star}]}
    plain = EngineRun(engine, batches)
    activated = EngineRun(engine | {"additional_config": {"starling": {}}}, star_batches)
    limit = f"the model takes {max_length:,} tokens at most"
    decodes: Callable[[], Result | Skip] = functools.partial(measure_decode, plain, activated)
    if not batches:
        decodes = functools.partial(Skip, f"{limit}, and {DECODE_LENGTH:,} are needed")
    prefills = [prefill_check(activated, length, fits, limit) for length, fits in lengths.items()]
    return [*prefills, Check("speed: a token, activated", decodes)]


def prefill_check(activated: EngineRun, wanted: int, length: int | None, limit: str) -> Check:
    """The measurement of a prompt's first token.

    Args:
        wanted: tokens of the prompt, if the model takes so many.
        length: tokens of the prompt; None: it is left out.
        limit: says how many tokens the model takes.
    """
    name = f"speed: first token of {length or wanted:,} tokens, star"
    if length is None:
        return Check(name, functools.partial(Skip, f"{limit}, and no other prompt of {SHORTEST:,} or more fits"))
    note = "" if length == wanted else f"; not {wanted:,} tokens, as {limit}"
    return Check(name, functools.partial(measure_ttft, activated, length, note))


def measure_ttft(activated: EngineRun, length: int, note: str) -> Result:
    """Seconds to the first token of a prompt of ``length`` tokens; ``note`` ends the detail."""
    (dense,), (star,) = activated.outputs(f"dense {length}"), activated.outputs(f"star {length}")
    ratio = dense["ttft"] / star["ttft"]
    return Result(star["ttft"], None, "s", f"dense {dense['ttft']:.3g} s, {ratio:.2f} times star's; block of n/8{note}")


def measure_decode(plain: EngineRun, activated: EngineRun) -> Result:
    ours, plains = (
        min(1000 * engine.outputs(f"decode {run}")[0]["seconds_per_token"] for run in range(RUNS))
        for engine in (activated, plain)
    )
    return Result(ours, None, "ms", f"plain vLLM {plains:.3g} ms, after {DECODE_PROMPT} tokens, fastest of {RUNS} runs")
