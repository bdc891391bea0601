"""A request of the machine: what it asks, what it must be answered, and what it was answered."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from starling.scheduler.planning.plan import StarPlan, num_client_tokens
from starling.scheduler.planning.request_metadata import SOURCES, RequestMetadata
from tests.unit.scheduler.simulation import make_request, token_fingerprints

STOP = 255
"""The token at which a request ends before its last token."""


@dataclass
class Grammar(StructuredOutputGrammar):
    """Accepts any tokens, up to a number of them, and keeps what it has accepted."""

    limit: int
    accepted: list[int] = field(default_factory=list)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        if len(self.accepted) + len(tokens) > self.limit:
            return False
        self.accepted += tokens
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("no token was speculated")

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """Allows all tokens."""

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None:
        self.accepted.clear()


@dataclass(eq=False)
class Case:
    """One request.

    Attributes:
        answers: the tokens that the model samples behind the prompt, one after the other.
        states: (tokens,) int64, the fingerprint of the KV state of each token of the prompt and the answers.
        received: the tokens that the scheduler has answered.
        ended: the finish reason; None while the request is live.
        skipped: prompt tokens that the runner did not compute before the first preemption.
        preempted: whether the request has been preempted.
        cached: prompt tokens that vLLM reports as cached; None before the first token.
        held: names and pages in the output of a part of a prompt.
    """

    request: Request
    answers: list[int]
    plan: StarPlan | None
    states: np.ndarray
    grammar: Future | None = None
    received: list[int] = field(default_factory=list)
    ended: str | None = None
    skipped: int = 0
    preempted: bool = False
    cached: int | None = None
    held: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def skipped_of_client(self) -> int:
        """The prompt tokens that count as cached: padding that was computed does not."""
        if self.plan is None:
            return self.skipped
        return max(num_client_tokens(self.plan) - (self.num_prompt_tokens - self.skipped), 0)

    def token_at(self, position: int) -> int:
        """The token that is sampled for a position behind the prompt."""
        return self.answers[position - self.num_prompt_tokens]

    def compile(self, limit: int, fails: bool) -> None:
        """The grammar that the request waits for is compiled, or can't be."""
        if fails:
            self.grammar.set_exception(ValueError("no grammar"))
        else:
            self.grammar.set_result(Grammar(limit))

    def accept(self, output: EngineCoreOutput) -> None:
        """Take an answer of the scheduler, and hold it against what was asked."""
        assert self.ended is None, f"{self.name} is answered after its end"
        self.received += output.new_token_ids
        expected = self.answers[: len(self.received)]
        assert self.received == expected, f"{self.name} is answered {self.received}, not {expected}"
        if output.prefill_stats is not None:
            assert self.cached is None, f"{self.name} reports its prefill twice"
            self.cached = output.prefill_stats.num_cached_tokens
        if output.finish_reason is not None:
            self.ended = str(output.finish_reason)
            given = output.kv_transfer_params or {}
            self.held = {key: value for key, value in given.items() if key != SOURCES} or None
            self.check_end()

    def check_end(self) -> None:
        accepted = self.grammar.result().accepted if self.grammar and not self.grammar.exception() else None
        match self.ended:
            case "length":
                assert len(self.received) == self.request.max_tokens and STOP not in self.received[:-1]
            case "stop":
                assert self.received[-1] == STOP
            case "error":
                assert self.grammar is not None, f"{self.name} ends with an error"
                return
        assert accepted is None or accepted == self.received, "the grammar of a request takes each token once"


@lru_cache(maxsize=512)
def states_of(ids: tuple[int, ...], plan: StarPlan | None, origin: object) -> np.ndarray:
    return token_fingerprints(list(ids), plan, origin)


def make_case(
    name: str,
    ids: list[int],
    answers: list[int],
    metadata: RequestMetadata,
    page_size: int,
    grammar: bool = False,
    **more: Any,
) -> Case:
    """A request over ``ids``, which is answered ``answers`` and ends with the last of them or at STOP."""
    sampling: dict[str, Any] = {"stop_token_ids": [STOP]}
    if grammar:
        sampling["structured_outputs"] = StructuredOutputsParams(json_object=True)
    request = make_request(name, metadata.plan, ids, page_size, len(answers), metadata, sampling=sampling, **more)
    plan = metadata.plan if metadata.plan is not None and not (len(metadata.plan.starts) < 2) else None
    adapter = request.lora_request.lora_int_id if request.lora_request else 0
    made = Case(request, answers, plan, states_of((*ids, *answers), plan, (adapter, request.cache_salt)))
    if grammar:
        made.grammar = request.structured_output_request.grammar = Future()
    return made
