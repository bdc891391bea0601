"""Measurements without a bound: times of the first token and of each token, CUDA graphs, and memory of the GPU."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starling.config.entry import ENTRY
from starling.lab.selftest.check_prompts import QUERY, WITH_DOCUMENTS, make_prompt
from starling.lab.selftest.engine import Batches, EngineRun, Feature, by_mode
from starling.lab.selftest.engine_checks import DOCUMENTS, HEADS, Engines
from starling.lab.selftest.model import adapter_refusal, alternating_scores
from starling.lab.selftest.result import Check, Result, Skip
from starling.lab.selftest.served import ADAPTER, adapter_feature

NO_GRAPHS = "no GPU: a CPU has no CUDA graphs"
NO_PROFILE = "no GPU: vLLM makes no memory profile on a CPU"
FULL = "FULL"
LENGTHS = {True: (32_768, 131_072), False: (4_096,)}  # by whether there is a GPU
DECODED, DECODE_PROMPT, RUNS = 32, 512, 6  # the fastest run counts, as other programs slow the others down
DECODE_LENGTH = DECODE_PROMPT + DECODED
BLOCK_FRACTION = 8  # of the prompt
DENSE_HEADS = 0.1
COUNT, DOCUMENT_TOKENS = 16, {True: 256, False: 64}  # documents of a prompt
DOCUMENTS_LENGTH = {gpu: COUNT * tokens + QUERY + DECODED for gpu, tokens in DOCUMENT_TOKENS.items()}
DOCUMENT_REQUESTS = {True: (1, 8, 64), False: (1, 4)}
REORDERED = "another order"
TAIL, TAIL_TOKENS = "a long tail", {True: 4_000, False: 500}  # behind documents, as a chat's own messages are
TAIL_DOCUMENTS = {True: 2_048, False: 128}  # tokens of each
WIDE = "documents beside a decode"  # behind a prompt that is as long as the largest step
WIDE_DOCUMENTS, WIDE_TOKENS = 25, 320
STEP_TOKENS = {True: 8192, False: 2048}
WARM = "warm"  # begins the names of batches that are not timed
WARM_DOCUMENTS = f"{WARM} documents"
BESIDE = 8  # requests with documents beside a long prompt that decodes
STEP = 1024  # prompts that are shortened have a multiple of this, of which an eighth is whole KV pages
SHORTEST = 2 * STEP  # a shorter prefill has too little attention to show what star saves


def lengths_within(lengths: Sequence[int], max_length: int) -> dict[int, int | None]:
    """Return the prompts to measure instead of those of ``lengths`` tokens, for a model that takes ``max_length``.

    One token is left for the output.

    Args:
        lengths: lengths in ascending order.

    Returns:
        Each length -> the same, or the longest one that fits; None where that is too short, or is another's already.
    """
    found: dict[int, int | None] = {}
    for length in lengths:
        fits = length if length < max_length else (max_length - 1) // STEP * STEP
        found[length] = fits if fits >= SHORTEST and fits not in found.values() else None
    return found


def speed_checks(
    model: str,
    vocabulary: int,
    max_length: int,
    gpu: bool,
    folder: Path,
    *,
    starling: Mapping[str, Any],
    quick: bool = False,
    note: str = "",
    **arguments: Any,
) -> list[Check]:
    """Return the measurements of two engines.

    Args:
        max_length: tokens that the model takes.
        folder: gets the file of the scores of KV heads.
        starling: options of the activated engines.
        quick: True to leave out long prompts.
        note: fact that the reader has to know of the model.
        arguments: further arguments of vllm.LLM.
    """
    lengths = {} if quick else lengths_within(LENGTHS[gpu], max_length)
    measured = [length for length in lengths.values() if length is not None]
    decodes = decode_batches(vocabulary, max_length)
    plain_documents, documents = (
        document_batches(vocabulary, measured, gpu, max_length, star) for star in (False, True)
    )
    plain_tails, tails = ({} if quick else tail_batches(vocabulary, gpu, max_length, star) for star in (False, True))
    plain_wide, wide = (wide_batches(vocabulary, gpu, max_length, star) for star in (False, True))
    longest = max(
        [
            *([STEP_TOKENS[gpu] + DECODED] if wide else []),
            *measured,
            DECODE_LENGTH,
            *([DOCUMENTS_LENGTH[gpu]] if documents else []),
            *([tail_length(gpu)] if tails else []),
        ]
    )
    engine = {"model": model, "dtype": "bfloat16" if gpu else "float32", "enforce_eager": not gpu} | arguments
    engine |= {"max_model_len": min(longest + STEP, max_length), "max_num_batched_tokens": STEP_TOKENS[gpu]}
    scores = folder / "speed_scores.json"
    scores.write_text(alternating_scores(model).model_dump_json())
    features = {
        HEADS: Feature({"star_heads": str(scores)}, prefill_batches(vocabulary, measured, {HEADS: DENSE_HEADS})),
        DOCUMENTS: Feature(WITH_DOCUMENTS, documents | tails | wide),
    }
    features = {name: feature for name, feature in features.items() if feature.batches}
    activated = engine | {"additional_config": {ENTRY: dict(starling)}}
    batches = decodes | prefill_batches(vocabulary, measured, {"dense": None, "star": 0})
    engines = Engines(
        model,
        EngineRun(engine, decodes | plain_documents | plain_tails | plain_wide),
        EngineRun(activated, batches, features=features),
    )
    limit = f"the model takes {max_length:,} tokens at most"
    checks = [prefill_check(engines, length, fits, limit, note) for length, fits in lengths.items()]
    decode: Callable[[], Result | Skip] = functools.partial(measure_decode, engines)
    if not decodes:
        decode = functools.partial(Skip, f"{limit}, and {DECODE_LENGTH:,} are needed")
    checks.append(Check("speed: a token, activated", decode))
    names = [name for name in documents if not name.startswith(WARM)]
    checks += [document_check(engines, name) for name in names]
    more: dict[str, tuple[Callable[[Engines], Result | Skip], int, Batches]] = {
        f"memory of {WIDE}": (measure_wide_step, STEP_TOKENS[gpu] + DECODED, wide)
    }
    if not quick:
        more[f"first token of {TAIL} behind documents"] = measure_tail, tail_length(gpu), tails
    for title, (measure, needed, has) in more.items():
        reason = f"{limit}, and {needed:,} are needed" if needed > max_length else NO_PROFILE
        run = functools.partial(measure, engines) if has else functools.partial(Skip, reason)
        checks.append(Check(f"speed: {title}", run))
    if documents and not quick:
        same = {name: batch for name, batch in documents.items() if name in (WARM_DOCUMENTS, *requests(gpu))}
        features = {DOCUMENTS: Feature(WITH_DOCUMENTS, same)} | adapter_feature(model, folder / "speed_adapter")
        adapted = EngineRun(activated, {}, features=features)
        checks += [adapter_check(engines, adapted, name) for name in requests(gpu)]
    decoded = {"star": list(decodes), DOCUMENTS: [name for name in names if name != REORDERED]}
    return checks + (usage_checks(engines.plain, engines.ours, decoded, gpu) if decodes else [])


def decode_batches(vocabulary: int, max_length: int) -> Batches:
    """Return a prompt that decodes, several times; none where the model does not take its length."""
    decode = make_prompt(1, DECODE_PROMPT, vocabulary, max_tokens=DECODED, cold=True)
    return {f"decode {run}": [decode] for run in range(RUNS)} if max_length >= DECODE_LENGTH else {}


def prefill_batches(vocabulary: int, lengths: Iterable[int], plans: Mapping[str, float | None]) -> Batches:
    """Return a prompt for each length and plan.

    Args:
        plans: name -> share of dense heads of a star plan, or None for dense attention.
    """
    batches = {}
    for length in lengths:
        prompt = make_prompt(2, length, vocabulary, max_tokens=1, cold=True)
        star = {"star": "on", "star_block_size": length // BLOCK_FRACTION, "star_query_tokens": 512}
        for name, share in plans.items():
            options = {} if share is None else {"star": star | {"star_dense_heads": share}}
            batches[f"{name} {length}"] = [prompt | options]
    return batches


def document_batches(vocabulary: int, lengths: Sequence[int], gpu: bool, max_length: int, star: bool) -> Batches:
    """Return prompts of the same documents, whose context is cached when they are timed; none where they do not fit.

    Args:
        lengths: lengths of long prompts, of which the last one decodes beside some of them.
        star: True if the documents are computed with a star plan.
    """
    size = DOCUMENT_TOKENS[gpu]
    starts = [size * number for number in range(COUNT + 1)]
    prompt = make_prompt(3, starts[-1] + QUERY, vocabulary, max_tokens=DECODED)
    if len(prompt["ids"]) + DECODED > max_length:
        return {}
    if star:
        prompt |= {"star": {"star": "on", "star_segments": starts}}
    ids = prompt["ids"]
    reordered = [token for start in starts[-2::-1] for token in ids[start : start + size]] + ids[starts[-1] :]
    batches = {WARM_DOCUMENTS: [prompt], REORDERED: [prompt | {"ids": reordered, "max_tokens": 1}]}
    batches |= {name: count * [prompt] for name, count in requests(gpu).items()}
    if lengths:
        long = make_prompt(2, lengths[-1], vocabulary, max_tokens=DECODED)
        name = f"{BESIDE} requests beside a decode of {lengths[-1]:,} tokens"
        batches |= {f"{WARM} long prompt": [long], name: [*BESIDE * [prompt], long]}
    return batches


def requests(gpu: bool) -> dict[str, int]:
    """Return the batches of equal prompts behind documents: name -> how many they are."""
    return {f"{count} requests": count for count in DOCUMENT_REQUESTS[gpu]}


def tail_length(gpu: bool) -> int:
    """Return the tokens of a prompt with a long tail, and one of output."""
    return COUNT * TAIL_DOCUMENTS[gpu] + TAIL_TOKENS[gpu] + 1


def tail_batches(vocabulary: int, gpu: bool, max_length: int, star: bool) -> Batches:
    """Return long documents, and then the same with many tokens behind them; none where they do not fit.

    Args:
        star: True if the documents are computed with a star plan.
    """
    if tail_length(gpu) > max_length:
        return {}
    starts = [TAIL_DOCUMENTS[gpu] * number for number in range(COUNT + 1)]
    documents = make_prompt(5, starts[-1], vocabulary)["ids"]
    tails = {f"{WARM} {TAIL}": QUERY, TAIL: TAIL_TOKENS[gpu]}
    return {
        name: [
            {"ids": documents + make_prompt(6 + length, length, vocabulary)["ids"], "max_tokens": 1}
            | ({"star": {"star": "on", "star_segments": starts}} if star else {})
        ]
        for name, length in tails.items()
    }


def wide_batches(vocabulary: int, gpu: bool, max_length: int, star: bool) -> Batches:
    """Return a dense prompt that decodes while many documents are computed in one step; none on a CPU, or without room.

    Args:
        star: True if the documents are computed with a star plan.
    """
    starts = [WIDE_TOKENS * number for number in range(WIDE_DOCUMENTS + 1)]
    if not gpu or STEP_TOKENS[gpu] + DECODED > max_length:
        return {}
    dense = make_prompt(7, STEP_TOKENS[gpu], vocabulary, max_tokens=DECODED, cold=True)
    documents = make_prompt(8, starts[-1] + QUERY, vocabulary, max_tokens=2, cold=True)
    return {WIDE: [dense, documents | ({"star": {"star": "on", "star_segments": starts}} if star else {})]}


def prefill_check(engines: Engines, wanted: int, length: int | None, limit: str, note: str = "") -> Check:
    """Return the measurement of a prompt's first token.

    Args:
        wanted: tokens of the prompt, if the model takes that many.
        length: tokens of the prompt, or None if it is left out.
        limit: says how many tokens the model takes.
        note: ends the detail.
    """
    name = f"speed: first token of {length or wanted:,} tokens, star"
    if length is None:
        return Check(name, functools.partial(Skip, f"{limit}, and no other prompt of {SHORTEST:,} or more fits"))
    shortened = "" if length == wanted else f"not {wanted:,} tokens, as {limit}"
    return Check(name, functools.partial(measure_ttft, engines, length, (shortened, note)))


def document_check(engines: Engines, batch: str) -> Check:
    """Return the measurement of a batch of prompts with documents: of the first token where their order differs."""
    if batch == REORDERED:
        return Check(
            f"speed: first token behind {COUNT} documents in {batch}",
            functools.partial(measure_reordered, engines),
        )
    return Check(
        f"speed: a token behind {COUNT} documents, {batch}", functools.partial(measure_documents, engines, batch)
    )


def measure_ttft(engines: Engines, length: int, notes: Iterable[str]) -> Result:
    """Measure the seconds to the first token of a prompt of ``length`` tokens; ``notes`` end the detail."""
    (dense,), (star,) = engines.ours.outputs(f"dense {length}"), engines.ours.outputs(f"star {length}")
    details = [f"dense {dense['ttft']:.3g} s, {dense['ttft'] / star['ttft']:.2f} times star's; block of n/8"]
    if engines.ours.refusal(HEADS) is None:
        (heads,) = engines.ours.outputs(f"{HEADS} {length}")
        ratio = dense["ttft"] / heads["ttft"]
        details.append(f"with {DENSE_HEADS:.0%} dense heads {heads['ttft']:.3g} s, dense {ratio:.2f} times that")
    return Result(star["ttft"], None, "s", "; ".join([*details, *filter(None, notes)]))


def measure_decode(engines: Engines) -> Result:
    ours, plains = (
        min(1000 * engine.outputs(f"decode {run}")[0]["seconds_per_token"] for run in range(RUNS))
        for engine in (engines.ours, engines.plain)
    )
    return Result(ours, None, "ms", f"plain vLLM {plains:.3g} ms, after {DECODE_PROMPT} tokens, fastest of {RUNS} runs")


def measure_reordered(engines: Engines) -> Result | Skip:
    """Measure the seconds to the first token of cached documents in another order, and of the same prompt dense."""
    refusal = engines.ours.refusal(DOCUMENTS)
    if refusal is not None:
        return Skip(refusal)
    (ours,), (plains,) = engines.ours.outputs(REORDERED), engines.plain.outputs(REORDERED)
    detail = f"{ours['cached']} tokens cached; plain vLLM, dense {plains['ttft']:.3g} s, {plains['cached']} cached"
    return Result(ours["ttft"], None, "s", detail)


def measure_documents(engines: Engines, batch: str) -> Result | Skip:
    """Measure the milliseconds between two tokens of a prompt with documents, and of the same prompt dense."""
    refusal = engines.ours.refusal(DOCUMENTS)
    if refusal is not None:
        return Skip(refusal)
    ours, plains = per_token(engines.ours, batch), per_token(engines.plain, batch)
    return Result(ours, None, "ms", f"plain vLLM, dense {plains:.3g} ms")


def per_token(run: EngineRun, batch: str) -> float:
    """Return the milliseconds between two tokens of a request, the median of a batch (raises EngineError)."""
    return 1000 * statistics.median(output["seconds_per_token"] for output in run.outputs(batch))


def measure_tail(engines: Engines) -> Result | Skip:
    """Measure the seconds to the first token of many tokens behind cached documents, and of the same prompt dense.

    A plain engine has the documents cached too, as they stand where they stood.
    """
    refusal = engines.ours.refusal(DOCUMENTS)
    if refusal is not None:
        return Skip(refusal)
    (ours,), (plains,) = engines.ours.outputs(TAIL), engines.plain.outputs(TAIL)
    length = len(engines.plain.batches[TAIL][0]["ids"])
    detail = f"{length - ours['cached']} tokens behind {ours['cached']} that are cached"
    return Result(
        ours["ttft"], None, "s", f"{detail}; plain vLLM, dense {plains['ttft']:.3g} s, {plains['cached']} cached"
    )


def adapter_check(engines: Engines, adapted: EngineRun, batch: str) -> Check:
    """Return the measurement of what an adapter adds to a token."""
    name = f"speed: a token behind {COUNT} documents with an adapter, {batch}"
    return Check(name, functools.partial(measure_adapter, engines, adapted, batch))


def measure_adapter(engines: Engines, adapted: EngineRun, batch: str) -> Result | Skip:
    """Measure the milliseconds between two tokens of a prompt with an adapter, and with documents alone.

    Args:
        adapted: an engine as ``engines.ours``, with the adapter.
    """
    without = per_token(engines.ours, batch) if engines.ours.refusal(DOCUMENTS) is None else None
    refusal = adapter_refusal(engines.model) or engines.ours.refusal(DOCUMENTS) or adapted.refusal(ADAPTER)
    if refusal or without is None:
        return Skip(str(refusal))
    ours = per_token(adapted, batch)
    return Result(ours, None, "ms", f"without it {without:.3g} ms: {ours - without:.3g} ms more a token")


def usage_checks(plain: EngineRun, ours: EngineRun, batches: Mapping[str, Sequence[str]], gpu: bool) -> list[Check]:
    """Return the measurements of an activated engine, beside those of plain vLLM.

    Args:
        plain: an engine without Starling.
        batches: kind of prompts -> batches of decodes, which both engines have. Kinds without batches have no check.
    """
    checks = []
    for kind, names in batches.items():
        if names:
            graphs = functools.partial(measure_graphs, ours, plain, kind, names)
            title = f"speed: steps in full CUDA graphs, {kind}"
            checks.append(Check(title, graphs if gpu else functools.partial(Skip, NO_GRAPHS)))
    memory = functools.partial(measure_memory, ours, plain)
    return [*checks, Check("speed: memory of the GPU", memory if gpu else functools.partial(Skip, NO_PROFILE))]


def measure_graphs(ours: EngineRun, plain: EngineRun, kind: str, batches: Sequence[str]) -> Result | Skip:
    """Measure the share of an engine's steps in full CUDA graphs, and of plain vLLM's with the same prompts."""
    refusal = ours.refusal(kind)
    if refusal is not None:
        return Skip(refusal)
    found, plains = ours.graphs(batches), plain.graphs(batches)
    detail = f"{found.total()} steps: {by_mode(found)}; plain vLLM {100 * full_share(plains):.3g} %"
    return Result(100 * full_share(found), None, "%", detail)


def full_share(steps: Counter[str]) -> float:
    return steps[FULL] / max(steps.total(), 1)


def measure_memory(ours: EngineRun, plain: EngineRun) -> Result | Skip:
    """Measure the GiB that the batches took at most.

    That is beside what was allocated before them, on the rank that took most.
    """
    refusal = ours.refusal()
    if refusal is not None:
        return Skip(refusal)
    ranks = [rank for batch in ours.result()["batches"].values() for rank in batch["memory"]]
    reserved, requested, profiled = (
        max(rank[name] for rank in ranks) / 2**30 for name in ("reserved", "requested", "profiled")
    )
    detail = (
        f"vLLM's profile has {profiled:.3g} GiB for it, plain vLLM takes {taken(plain):.3g} GiB; "
        f"torch has reserved {reserved:.3g} GiB in all, of {requested:.3g} GiB that vLLM may take"
    )
    return Result(taken(ours), None, "GiB", detail)


def measure_wide_step(engines: Engines) -> Result | Skip:
    """Measure the GiB that documents beside a decode behind a long prompt took at most.

    And those of the same prompts, dense.

    FlashAttention may keep partial results of split keys for such a step, of which no memory profile knows.
    """
    refusal = engines.ours.refusal(DOCUMENTS)
    if refusal is not None:
        return Skip(refusal)
    profiled = max(rank["profiled"] for rank in engines.ours.result()["memory"]) / 2**30
    detail = (
        f"vLLM's profile has {profiled:.3g} GiB for it, plain vLLM, dense takes {taken(engines.plain, WIDE):.3g} GiB"
    )
    return Result(taken(engines.ours, WIDE), None, "GiB", detail)


def taken(run: EngineRun, *names: str) -> float:
    """Return the GiB that some batches, or all, took at most.

    That is beside what was allocated before them, on the rank that took most.
    """
    result = run.result()
    batches = [result["batches"][name]["memory"] for name in names or result["batches"]]
    ranks = (pair for batch in batches for pair in zip(result["memory"], batch, strict=True))
    return max(end["peak"] - start["allocated"] for start, end in ranks) / 2**30
