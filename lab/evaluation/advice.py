"""Meaning of each word of star_quality on the user's prompts, by the losses of three plans, and the advice."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from starling.config.quality import size_text, size_texts
from starling.config.star import PREFIX, QUALITY_SIZES, flat_name
from starling.lab.evaluation.prompt_options import Plan, PromptOptions, parse_plan
from starling.lab.evaluation.prompts import Prompt, read_own_prompts
from starling.lab.evaluation.report import percent, points
from starling.lab.statistics import LOSSLESS_DRAWS, Interval, lower_bound, prompts_needed, upper_bound
from starling.scheduler.planning.sizes import DEFAULT_QUALITY

LIMITS = {"careful": 2.0, "balanced": 5.0, "fast": 10.0}
"""Percent by which the tokens of the answers may become less probable, for each word of star_quality."""
NUM_BLOCKS = (16, 8, 4)
"""The candidates, the cheapest first: into how many star blocks a prompt is cut, with all other options by default."""
NUM_LOGPROBS = 8  # tokens of an answer that are compared
LEAST_PROMPTS = 20
LEAST_REPEATED = 0.1  # of the prompts' tokens, for which documents are worth a line
COLUMNS = ("plan", "attention work", "loss [95 %]", "on the held-out prompts")


class AdviseOptions(PromptOptions):
    """The prompts of `starling advise`: the user's own."""

    subcommand: ClassVar[str] = "advise"

    @property
    def compares_text(self) -> bool:
        return False

    def check(self) -> None:
        """Refuse (ValueError) prompts that can't be read, and too few of them."""
        super().check()
        assert self.prompts is not None
        refuse_few(len({prompt.model_dump_json() for _, prompt in read_own_prompts(self.prompts)}))


def refuse_few(number: int) -> None:
    """Refuse (ValueError) a number of prompts whose halves are too few for an interval."""
    if number < LEAST_PROMPTS:
        raise ValueError(f"{number} different prompts are too few for an interval: {LEAST_PROMPTS} are needed")


class Loss(Interval):
    """Loss in log probability of the answers' tokens, in nats for each token, the mean over prompts.

    Attributes:
        low, high: one-sided bounds, each with a confidence of 95 %.
    """

    prompts: int


class Closest(BaseModel):
    """The plan that came closest to a limit, where none is within it.

    Attributes:
        prompts_needed: about how many prompts would show that the plan is within the limit, if others lose what these
            did, or None if its mean loss is above the limit, or very many are needed.
    """

    model_config = ConfigDict(frozen=True)

    plan: str
    loss: Loss
    prompts_needed: int | None


class Word(BaseModel):
    """Meaning of a word of star_quality on the user's prompts.

    Attributes:
        limit: the word by whose limit the plan was found: this one, or one that allows less.
        num_blocks: number of star blocks of a prompt; 1 if it is dense, since no plan is shown to be good enough.
        loss: loss on the held-out prompts, or None where it is dense.
        closest: the plan that came closest, where it is dense.
    """

    model_config = ConfigDict(frozen=True)

    limit: str
    num_blocks: int
    loss: Loss | None = None
    closest: Closest | None = None


def plan_of(num_blocks: int) -> Plan:
    """Return the plan of ``num_blocks`` star blocks."""
    return parse_plan(size_text(num_blocks))


@dataclass
class Candidate:
    """A plan that was measured.

    Attributes:
        searched: the losses of the prompts by which a plan is chosen.
        held_out: the losses of the others; empty where the plan was not chosen.
        keys: query-key pairs of each prefill as a share of dense's.
    """

    num_blocks: int
    searched: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    keys: list[float] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return plan_of(self.num_blocks)

    @property
    def attended_keys(self) -> float:
        return float(np.mean(self.keys))


class CandidateResult(BaseModel):
    """A candidate in `advice.json`; ``held_out`` is None where the plan was not chosen."""

    model_config = ConfigDict(frozen=True)

    plan: str
    attended_keys: float
    searched: Loss
    held_out: Loss | None


class Advice(BaseModel):
    """The findings and the advice; `advice.json`.

    Attributes:
        version: version of this format. A field that is removed or changes its meaning raises it.
        created: UTC, ISO 8601.
        command: command line that repeats the measurement.
        server: base URL, model, max_model_len, version of vLLM.
        prompts: numbers of prompts searched, held out, and left out as equal to others, their lengths, and how many
            of their tokens are texts that an earlier one has too (``repeats.repeated_tokens``).
        words: each word of star_quality, and its meaning.
        flags: options of `starling serve`; empty where the advice is to serve without star.
        additional_config: the same for `vllm serve` and ``LLM``; None where ``flags`` is empty.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["starling-advice"] = "starling-advice"
    version: int = 1
    created: str
    command: str
    server: dict[str, Any]
    prompts: dict[str, int]
    candidates: list[CandidateResult]
    words: dict[str, Word]
    flags: list[str]
    additional_config: dict[str, Any] | None


def halves(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts by which plans are chosen, and those that confirm them.

    A prompt's half depends on the hash of its tokens, not on its place in a file.
    """
    ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps(prompt.token_ids).encode()).digest())
    return ordered[::2], ordered[1::2]


def make_loss(losses: Sequence[float]) -> Loss:
    """Return the mean and its bounds. Each bound adds the largest loss, or gain, that was seen, to the sample."""
    return Loss(
        prompts=len(losses),
        mean=float(np.mean(losses)),
        low=lower_bound(losses, min(*losses, 0.0)),
        high=upper_bound(losses, max(*losses, 0.0)),
    )


def is_within(losses: Sequence[float], limit: float) -> bool:
    """Return whether a mean loss is shown to be within a limit in percent."""
    return make_loss(losses).high <= limit / 100


def chosen(candidates: Sequence[Candidate], limit: float) -> Candidate | None:
    """Return the cheapest plan that the searched prompts show to be within a limit in percent, or None."""
    return next((candidate for candidate in candidates if is_within(candidate.searched, limit)), None)


def find_words(candidates: Sequence[Candidate]) -> dict[str, Word]:
    """Find, for each word, the cheapest plan that both halves show to be within its limit, or a stricter one.

    Args:
        candidates: plans with their losses, the cheapest first.
    """
    words: dict[str, Word] = {}
    shown: Word | None = None
    for word, limit in LIMITS.items():
        found = chosen(candidates, limit)
        if (
            found is not None
            and is_within(found.held_out, limit)
            and found.num_blocks > (shown.num_blocks if shown else 1)
        ):
            shown = Word(limit=word, num_blocks=found.num_blocks, loss=make_loss(found.held_out))
        words[word] = shown or Word(limit=word, num_blocks=1, closest=find_closest(candidates, found, limit))
    return words


def find_closest(candidates: Sequence[Candidate], unconfirmed: Candidate | None, limit: float) -> Closest:
    """Return the plan that was chosen and not confirmed, or else the one with the lowest upper bound.

    Args:
        limit: limit in percent.
    """
    found = unconfirmed or min(candidates, key=lambda candidate: make_loss(candidate.searched).high)
    losses = found.held_out if unconfirmed else found.searched
    needed = prompts_needed(losses, max(*losses, 0.0), limit / 100)
    return Closest(plan=found.plan.name, loss=make_loss(losses), prompts_needed=needed and 2 * needed)


def results(candidates: Sequence[Candidate]) -> list[CandidateResult]:
    return [
        CandidateResult(
            plan=candidate.plan.name,
            attended_keys=candidate.attended_keys,
            searched=make_loss(candidate.searched),
            held_out=make_loss(candidate.held_out) if candidate.held_out else None,
        )
        for candidate in candidates
    ]


def served_options(words: Mapping[str, Word], min_tokens: int) -> dict[str, Any]:
    """Return the server's options with which the words have the found meaning; none where the default one is dense.

    Args:
        min_tokens: length below which prompts stay dense: no shorter one was measured.
    """
    if words[DEFAULT_QUALITY].num_blocks == 1:
        return {}
    sizes = size_texts({word: found.num_blocks for word, found in words.items()})
    return {PREFIX: "auto", flat_name("min_tokens"): min_tokens, QUALITY_SIZES: sizes}


def server_flags(options: Mapping[str, Any]) -> list[str]:
    """Return the options of a server as words of its command line."""
    flags = []
    for name, value in options.items():
        text = ",".join(f"{key}={part}" for key, part in value.items()) if isinstance(value, dict) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    return flags


def table_rows(advice: Advice) -> list[list[str]]:
    """Return the candidates as texts for COLUMNS."""
    return [
        [row.plan, percent(row.attended_keys), points(row.searched), points(row.held_out) if row.held_out else ""]
        for row in advice.candidates
    ]


def advice_lines(advice: Advice, served: Sequence[str], speed: str, *, pays: bool = True) -> list[str]:
    """Return the advice, in lines.

    Args:
        served: the model, and further options of the server.
        speed: time by which the first token comes sooner, in words.
        pays: True if star pays.
    """
    word, limit = advice.words[DEFAULT_QUALITY], LIMITS[DEFAULT_QUALITY]
    if word.loss is None:
        assert word.closest is not None
        return [
            "Advice: serve without star, or accept a larger loss.",
            f"  {shlex.join(['starling', 'serve', *served])}",
            f"  why: no plan is shown to keep the loss within {limit:g} %. {word.closest.plan} is the closest: "
            f"{points(word.closest.loss)} % of the probability of the answers' tokens, on {word.closest.loss.prompts} "
            "prompts",
        ]
    keys = next(row.attended_keys for row in advice.candidates if row.plan == size_text(word.num_blocks))
    rare = percent(min(LOSSLESS_DRAWS / (word.loss.prompts + 1), 1.0))
    return [
        "Advice:" if pays else "Advice, for longer prompts than these, which star makes no faster:",
        f"  {shlex.join(['starling', 'serve', *served, *advice.flags])}",
        f"  gain: the first token comes {speed}; {percent(keys)} of dense's attention work",
        f"  cost: the answers' tokens are {changed(word.loss.mean)} on average, and at most "
        f"{100 * word.loss.high:.1f} % less with a confidence of 95 % ({word.loss.prompts} prompts that did not choose "
        f"the plan). A kind of prompt that loses much more, and is at most {rare} of all, may not be among these",
        "  a single request can have another quality, or star=off:",
        *(f"  star_quality={name}: {meaning(advice.words[name], LIMITS[name])}" for name in ("fast", "careful")),
    ]


def meaning(word: Word, limit: float) -> str:
    """Return a word's meaning and its cost.

    Args:
        limit: limit of the word, in percent.
    """
    if word.loss is not None:
        loss = f"at most {100 * word.loss.high:.1f} % less probable"
        return f"{size_text(word.num_blocks)}, {loss}, within its limit of {limit:g} %"
    needed = word.closest.prompts_needed if word.closest else None
    hint = f"; about {needed} prompts may show {word.closest.plan}" if word.closest and needed else ""
    return f"dense, since no plan is shown to be within its limit of {limit:g} %{hint}"


def changed(loss: float) -> str:
    """Return a mean loss in words: "1.2 % less probable"."""
    return f"{100 * abs(loss):.1f} % {'less' if loss > 0 else 'more'} probable"


def document_lines(advice: Advice, served: Sequence[str]) -> list[str]:
    """Return what documents would find of the prompts' texts, in lines; none where that is little.

    Args:
        served: the model, and further options of the server.
    """
    repeated, tokens = advice.prompts["repeated_tokens"], advice.prompts["tokens"]
    if repeated < LEAST_REPEATED * tokens:
        return []
    return [
        f"Or documents, if each is a message: {repeated:,} of the prompts' {tokens:,} tokens "
        f"({percent(repeated / tokens)}) are texts that an earlier prompt has too, at another place, and documents "
        "find them cached (docs/recipe-rag.md):",
        f"  {shlex.join(['starling', 'serve', *served, '--preset', 'rag'])}",
    ]
