"""Checks of whole engines: each setting has a plain engine and an activated one, which all its checks share."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from starling.config.entry import ENTRY, GPU_ATTENTION
from starling.lab.selftest import check_prompts as p
from starling.lab.selftest.engine import Batches, EngineError, EngineRun, Feature
from starling.lab.selftest.kernels import rms
from starling.lab.selftest.masks import star_mask
from starling.lab.selftest.model import alternating_scores, reference_logprobs, reference_refusal
from starling.lab.selftest.result import Check, Result, Skip
from starling.vllm_compat.versions import release_of, vllm_version

GAP = 1.5  # of star's distance from the reference to dense's
REROTATED_GAP = 4.0  # where a query is rotated twice, by angles that are rounded twice; wrong angles give 30 and more
NOISE = 8.0  # of dense's RMS gap: four deviations of a difference of two tokens in two runs
HEADS, DOCUMENTS = "dense heads", "documents"
FP8_CAPABILITY = (8, 9)
NO_DOCUMENTS = "documents are refused with an fp8 KV cache"
SYNC_CHECK = {"VLLM_GPU_SYNC_CHECK": "error"}
JIT_MONITOR = {"jit_monitor_mode": "error"}
NOT_LOOKED_FOR = "no GPU: vLLM looks for both on a GPU only"
READS_LENGTHS = "xformers makes its masks on the host, from lengths that it reads from the GPU"


@dataclass(frozen=True)
class Setting:
    """Setting in which an engine runs.

    Attributes:
        runner: "V1" or "V2" model runner, or None for vLLM's choice.
        eager: without CUDA graphs and compilation.
        kv_dtype: vLLM's kv_cache_dtype.
    """

    runner: str | None
    eager: bool
    kv_dtype: str = "auto"

    def name(self) -> str:
        kv_dtype = "KV as the model" if self.kv_dtype == "auto" else f"KV {self.kv_dtype}"
        return ", ".join([self.runner or "default runner", "eager" if self.eager else "graphs", kv_dtype])


def settings(gpu: bool, quick: bool) -> list[Setting]:
    """Return the settings to check on a GPU or on a CPU; with ``quick`` one, as vLLM would run.

    On a GPU, each two values of different fields meet in one of four settings. Since vLLM 0.34 there is one runner.
    """
    v2, v1 = ("V2", "V1") if release_of(vllm_version() or "") < (0, 34) else (None, None)
    if not gpu:
        return [Setting(v1, eager=True)]
    if quick:
        return [Setting(None, eager=False)]
    return [
        Setting(v2, eager=False),
        Setting(v2, eager=True, kv_dtype="fp8"),
        Setting(v1, eager=True),
        Setting(v1, eager=False, kv_dtype="fp8"),
    ]


@dataclass(frozen=True)
class Engines:
    """The engines of a setting.

    Attributes:
        model: path or name of the checkpoint.
        plain: without Starling.
        ours: activated, and made for HEADS and DOCUMENTS; not for documents with an fp8 KV cache.
    """

    model: str
    plain: EngineRun
    ours: EngineRun

    @functools.cached_property
    def dense_gap(self) -> float | None:
        """Return the RMS gap of dense logprobs to the reference, or None where there is no reference."""
        return None if reference_refusal(self.model) else gap_to_reference(self, "dense")

    @functools.cached_property
    def own_gap(self) -> float:
        """Return the RMS gap of dense logprobs to the reference, or without one to the same prompt's beside others."""
        if self.dense_gap is not None:
            return self.dense_gap
        alone, beside = self.plain.outputs("dense")[0], self.plain.outputs("dense, beside")[-1]
        return rms(torch.tensor(all_logprobs(alone)) - torch.tensor(all_logprobs(beside)))

    def noise(self) -> float:
        """Return the difference in nats below which two tokens are equally probable to two runs of this setting."""
        return NOISE * self.own_gap

    def documents_refusal(self) -> str | None:
        """Return why there are no documents, or None if there are."""
        return self.ours.refusal(DOCUMENTS) if DOCUMENTS in self.ours.features else NO_DOCUMENTS


def make_engines(
    model: str,
    vocabulary: int,
    max_length: int,
    setting: Setting,
    gpu: bool,
    folder: Path,
    *,
    starling: Mapping[str, Any],
    **arguments: Any,
) -> Engines:
    """Make the engines of a setting; none is started yet.

    Args:
        max_length: tokens that the model takes, at least ``check_prompts.LONGEST``.
        folder: gets the file of the scores of KV heads.
        starling: options of the activated engines.
        arguments: further arguments of vllm.LLM, which go before the setting's.
    """
    engine = {
        "model": model,
        "dtype": "bfloat16" if gpu else "float32",
        "block_size": p.PAGE_SIZE,
        "max_model_len": min(p.MAX_LENGTH, max_length),
        "num_gpu_blocks_override": p.NUM_PAGES,
        "max_num_batched_tokens": p.STEP_TOKENS,
        "max_num_seqs": 64,
        "enforce_eager": setting.eager,
        "kv_cache_dtype": setting.kv_dtype,
        "enable_prefix_caching": True,
    } | arguments
    env = {} if setting.runner is None else {"VLLM_USE_V2_MODEL_RUNNER": str(int(setting.runner == "V2"))}
    batches = p.star_batches(vocabulary, num_decodes=63 if gpu else 7)
    scores = folder / "scores.json"
    scores.write_text(alternating_scores(model).model_dump_json())
    features = {HEADS: Feature({"star_heads": str(scores)}, p.head_batches(vocabulary))}
    if setting.kv_dtype == "auto":
        features[DOCUMENTS] = Feature(p.WITH_DOCUMENTS, p.document_batches(vocabulary))
    activated = engine | {"additional_config": {ENTRY: dict(starling)}}
    plain = EngineRun(engine, p.plain_batches(vocabulary), env)
    return Engines(model, plain, EngineRun(activated, batches, env, features))


def engine_checks(name: str, engines: Engines) -> list[Check]:
    """Return the checks of a setting, which ``name`` describes."""
    checks: dict[str, Callable[[Engines], Result | Skip]] = {
        "engines start": check_start,
        "star off equals plain vLLM": check_off,
        "one star block equals dense": check_one_block,
        "star against the mask": check_mask,
        "star beside decodes": check_beside,
        "preemption": check_preemption,
        "prefix hit": functools.partial(check_cached, warm="warm", cold="alone"),
        "reuse of star blocks": functools.partial(check_cached, warm="edited", cold="edited, cold"),
        "dense heads against the masks": check_heads,
        "dense heads beside a prompt without": check_heads_beside,
        "documents": check_documents,
        "documents in another order": check_reordered,
    }
    return [Check(f"{name}: {title}", functools.partial(check, engines)) for title, check in checks.items()]


def judge_tokens(outputs: list[dict], expected: list[dict], noise: float, detail: str = "") -> Result:
    """Count the outputs whose tokens differ, without those that differ first where two tokens are equally probable."""
    different, ties = 0, 0
    for output, other in zip(outputs, expected, strict=True):
        pairs = zip(output["token_ids"], other["token_ids"], other["margins"], strict=True)
        margin = next((margin for token, wanted, margin in pairs if token != wanted), None)
        ties += margin is not None and margin <= noise
        different += margin is not None and not margin <= noise
    tokens = sum(len(output["token_ids"]) for output in outputs)
    details = [
        f"{len(outputs)} outputs, {tokens} tokens",
        f"{ties} ties within {noise:.1e} nats" if ties else "",
        detail,
    ]
    return Result(different, 0, "outputs that differ", ", ".join(filter(None, details)))


def check_start(engines: Engines) -> Result:
    """Start both engines and run their batches; the seconds of both, and the environment of the activated one."""
    start = time.monotonic()
    engines.plain.result()
    engines.ours.result()
    detail = ", ".join(f"{name} {value}" for name, value in engines.ours.environment().items())
    return Result(time.monotonic() - start, None, "s", detail)


def check_off(engines: Engines) -> Result:
    return judge_tokens(engines.ours.outputs("off"), engines.plain.outputs("off"), engines.noise())


def check_one_block(engines: Engines) -> Result:
    """Measure the RMS distance of all logprobs; NaN where tokens differ too."""
    (one_block,), (dense,) = engines.ours.outputs("one block"), engines.ours.outputs("dense")
    difference = torch.tensor(all_logprobs(one_block)) - torch.tensor(all_logprobs(dense))
    tokens = judge_tokens([one_block], [dense], engines.noise())
    gap = rms(difference)
    return Result(math.nan if tokens.measured else gap, GAP * engines.own_gap, "nats RMS", tokens.detail)


def all_logprobs(output: dict) -> list[float]:
    """Return the log-probabilities of the prompt's tokens after the first, and of the generated tokens."""
    return output["prompt_logprobs"] + output["logprobs"]


def gap_to_reference(engines: Engines, batch: str, **mask: int) -> float:
    """Return the RMS distance of an engine's logprobs, prompt and output, from the float32 reference.

    Args:
        batch: batch of one prompt.
        mask: the sizes that ``star_mask`` takes; none for the causal mask.
    """
    (output,), (prompt,) = engines.ours.outputs(batch), engines.ours.batches[batch]
    ids = prompt["ids"] + output["token_ids"]
    allowed = star_mask(len(ids), **mask) if mask else torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return rms(torch.tensor(all_logprobs(output)) - reference_logprobs(engines.model, ids, allowed))


def check_mask(engines: Engines, bound: float = GAP, anchor_size: int = p.BLOCK) -> Result | Skip:
    """Measure star's RMS gap to the reference with the explicit mask, over dense's gap to the causal reference.

    Args:
        anchor_size: anchor size of the mask.
    """
    refusal, dense_gap = reference_refusal(engines.model), engines.dense_gap
    if refusal or not dense_gap:
        return Skip(str(refusal))
    sizes = {"block_size": p.BLOCK, "anchor_size": anchor_size, "overlap_size": 0, "context_end": p.CONTEXT}
    star, dense = gap_to_reference(engines, "star", **sizes), dense_gap
    effect = gap_to_reference(engines, "star")
    detail = f"star {star:.1e}, dense {dense:.1e} nats RMS; without the mask {effect:.1e}"
    return Result(star / dense, bound, "x dense's gap", detail)


def check_heads(engines: Engines) -> Result | Skip:
    """Measure the RMS gap of a plan with dense heads to the reference with a mask for each head, over dense's gap."""
    refusal, dense_gap = engines.ours.refusal(HEADS) or reference_refusal(engines.model), engines.dense_gap
    if refusal or not dense_gap:
        return Skip(str(refusal))
    (output,), (prompt,) = engines.ours.outputs("heads"), engines.ours.all_batches["heads"]
    ids, scores = prompt["ids"] + output["token_ids"], alternating_scores(engines.model)
    mask = star_mask(len(ids), block_size=p.BLOCK, anchor_size=p.BLOCK, overlap_size=0, context_end=p.CONTEXT)
    dense = scores.order[: scores.count(p.DENSE_HEADS)]
    gap, without = (
        rms(torch.tensor(all_logprobs(output)) - reference_logprobs(engines.model, ids, mask, heads))
        for heads in (dense, ())
    )
    detail = f"{len(dense)} of {scores.num_heads} heads; {gap:.1e}, dense {dense_gap:.1e} nats RMS"
    return Result(gap / dense_gap, GAP, "x dense's gap", f"{detail}; with the mask of the others {without:.1e}")


def check_heads_beside(engines: Engines) -> Result | Skip:
    """Compare a prompt with dense heads beside one without, with a cached context, and alone. NaN: not cached."""
    refusal = engines.ours.refusal(HEADS)
    if refusal:
        return Skip(refusal)
    outputs = [engines.ours.outputs("heads, beside")[1], *engines.ours.outputs("heads, cached")]
    cached = outputs[1]["cached"]
    detail = f"{cached} of {p.LENGTH} prompt tokens cached"
    result = judge_tokens(outputs, 2 * engines.ours.outputs("heads, alone"), engines.noise(), detail)
    return result if cached else Result(math.nan, 0, result.unit, f"{detail}: some expected")


def check_documents(engines: Engines, bound: float = REROTATED_GAP) -> Result | Skip:
    """Measure the RMS gap of documents to their reference, over dense's gap to its reference.

    Without an anchor, a document's tokens see one another alone, and their distances are those of the prompt. So the
    reference is the explicit mask at the prompt's positions, while the engine re-rotates the question's queries for
    each document.
    """
    refusal, dense_gap = engines.documents_refusal() or reference_refusal(engines.model), engines.dense_gap
    if refusal or not dense_gap:
        return Skip(str(refusal))
    (output,), (prompt,) = engines.ours.outputs("documents"), engines.ours.all_batches["documents"]
    ids, context_end = prompt["ids"] + output["token_ids"], sum(p.DOCUMENTS)
    lengths = [*p.DOCUMENTS, len(ids) - context_end]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.arange(len(ids))
    seen = (document[:, None] == document[None]) | (position >= context_end)[:, None]
    difference = torch.tensor(all_logprobs(output)) - reference_logprobs(
        engines.model, ids, seen & (position[None] <= position[:, None])
    )
    follows = torch.ones(len(ids), dtype=torch.bool)  # the first token of a document follows padding
    follows[[sum(p.DOCUMENTS[:number]) for number in range(len(lengths))]] = False
    gap = rms(difference[follows[1:]])
    return Result(gap / dense_gap, bound, "x dense's gap", f"documents {gap:.1e}, dense {dense_gap:.1e} nats RMS")


def check_reordered(engines: Engines) -> Result | Skip:
    """Compare documents whose KV is cached in another order, and computed anew. NaN where not all were cached."""
    refusal = engines.documents_refusal()
    if refusal:
        return Skip(refusal)
    (output,), expected = engines.ours.outputs("reordered"), engines.ours.outputs("reordered, cold")
    cached, length = output["cached"], sum(p.DOCUMENTS)
    result = judge_tokens([output], expected, engines.noise(), f"{cached} of {length + p.QUERY} prompt tokens cached")
    enough = cached >= length and not expected[0]["cached"]
    return result if enough else Result(math.nan, 0, result.unit, f"{result.detail}: {length} expected")


def check_beside(engines: Engines) -> Result:
    """Compare the star prompt beside prompts that decode, and alone."""
    outputs = engines.ours.outputs("beside")
    beside = f"beside {len(outputs) - 1} decodes"
    return judge_tokens(outputs[-1:], engines.ours.outputs("alone"), engines.noise(), beside)


def check_preemption(engines: Engines) -> Result:
    """Compare prompts that exceed the KV cache together, and in two halves that fit. NaN: nothing was preempted."""
    calm = engines.ours.outputs("calm 1") + engines.ours.outputs("calm 2")
    batches = engines.ours.result()["batches"]
    preemptions = batches["preempted"]["preemptions"]
    result = judge_tokens(engines.ours.outputs("preempted"), calm, engines.noise(), f"{preemptions:.0f} preemptions")
    if not preemptions or batches["calm 1"]["preemptions"] or batches["calm 2"]["preemptions"]:
        return Result(math.nan, 0, result.unit, f"{result.detail}: expected in this batch, and only in it")
    return result


def check_cached(engines: Engines, warm: str, cold: str) -> Result:
    """Compare a prompt whose KV is cached in part, and the same prompt cold. NaN where too few tokens were cached.

    Args:
        warm, cold: batches of one prompt. An edited prompt is cached up to the edit and again behind its star block.
    """
    (output,), expected = engines.ours.outputs(warm), engines.ours.outputs(cold)
    cached, before_edit = output["cached"], p.EDITED_BLOCK * p.BLOCK + p.BLOCK // 2
    result = judge_tokens([output], expected, engines.noise(), f"{cached} of {p.LENGTH} prompt tokens cached")
    enough = cached > before_edit and not expected[0]["cached"]
    return result if enough else Result(math.nan, 0, result.unit, f"{result.detail}: more than {before_edit} expected")


def bare(batches: Batches) -> Batches:
    """Return the same prompts without log-probabilities, for which vLLM itself waits."""
    return {
        name: [prompt | {"bare": True, "prompt_logprobs": False} for prompt in batch] for name, batch in batches.items()
    }


def steady(run: EngineRun) -> EngineRun:
    """Return an engine as ``run``, which fails if a step waits for the GPU or compiles a kernel."""
    features = {name: Feature(feature.options, bare(feature.batches)) for name, feature in run.features.items()}
    return EngineRun(run.engine | JIT_MONITOR, bare(run.batches), run.env | SYNC_CHECK, features)


def without_starling(run: EngineRun, plain: EngineRun) -> EngineRun:
    """Return a plain engine with the prompts of an activated one, dense: its steps are as wide."""
    batches = {
        name: [{field: value for field, value in prompt.items() if field != "star"} for prompt in batch]
        for name, batch in run.all_batches.items()
    }
    return replace(plain, batches=batches)


def steady_checks(name: str, plain: EngineRun, ours: EngineRun, gpu: bool) -> list[Check]:
    """Return the check of the setting that ``name`` describes.

    Args:
        plain: an engine without Starling.
        ours: an activated engine.
    """
    title = f"{name}: no waiting and no compilation"
    if not gpu:
        return [Check(title, functools.partial(Skip, NOT_LOOKED_FOR))]
    if ours.engine["additional_config"][ENTRY].get(GPU_ATTENTION) == "xformers":
        return [Check(title, functools.partial(Skip, READS_LENGTHS))]
    return [Check(title, functools.partial(check_steady, steady(without_starling(ours, plain)), steady(ours)))]


def check_steady(plain: EngineRun, ours: EngineRun) -> Result | Skip:
    """Run all batches of an engine that fails if a step waits or compiles (raises EngineError then).

    It is skipped where plain vLLM fails with the same prompts, or where the model can't have star plans.
    """
    refusal = ours.refusal()
    if refusal is not None:
        return Skip(refusal)
    try:
        plain.result()
    except EngineError as error:
        return Skip(f"plain vLLM fails: {str(error).splitlines()[-1]}")
    batches = ours.result()["batches"]
    tokens = sum(len(output["token_ids"]) for batch in batches.values() for output in batch["outputs"])
    return Result(tokens, None, "tokens", f"{len(batches)} batches")
