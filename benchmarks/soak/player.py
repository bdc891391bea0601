"""Plays requests, accounts for each, and compares answers with the first answer to the same case."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.soak.cases import Case, make_cases, spread_of
from benchmarks.soak.ledger import ANSWERED, DIFFERENT, Ledger
from benchmarks.soak.target import STARLING, Clients, Output, RefusedError, body_of
from starling.client import StarlingError

if TYPE_CHECKING:
    from benchmarks.soak.mix import Kind

DEADLINE_SECONDS = 120
MARGIN = 1e-3
"""In float32, the rows of a batch change log probabilities by up to 5e-5."""


class Player:
    """Sends requests of any kind with the same clients.

    Attributes:
        cases: prompts whose answers are known.
        answers: name of a case -> its answer.
        spread: star options of a prompt that is split over the server's replicas, if it has several.
    """

    def __init__(self, clients: Clients, hold_seconds: float = 8, ledger: Ledger | None = None) -> None:
        """Prepare the player; no request is sent yet.

        Args:
            hold_seconds: seconds that a client that has stopped to read stays connected.
            ledger: the account of requests; by default one of its own.
        """
        self.clients = clients
        self.target = clients.target
        self.model = self.target.model
        self.hold_seconds = hold_seconds
        self.random = random.Random(0)
        self.ledger = ledger or Ledger()
        self.cases: list[Case] = []
        self.answers: dict[str, list[Any]] = {}
        self.spread: dict[str, Any] = spread_of(self.target.replicas)

    async def learn_answers(self) -> None:
        """Store the answer of an idle server to each case.

        A case with two tokens that are nearly as likely as one another gets another prompt: the last bits of a log
        probability depend on the other requests of a step.

        Raises:
            RuntimeError: a case has no prompt with one right answer.
        """
        variants = [make_cases(self.target.replicas, seed) for seed in ("", "another ", "a third ")]
        for same in zip(*variants, strict=True):
            for case in same:
                body = body_of(case, self.model) | {"logprobs": 2, "return_tokens_as_token_ids": True}
                output, margin = await self._answer(body)
                if margin > MARGIN or case.form:
                    break
            else:
                raise RuntimeError(f"the case {case.name!r} has no prompt with one right answer")
            self.cases.append(case)
            self.answers[case.name] = output

    async def _answer(self, body: dict[str, Any]) -> tuple[list[int], float]:
        """Return the tokens of a greedy completion, and the least distance between its first and second choice."""
        async with self.clients.post("/v1/completions", body) as response:
            (choice,) = (await response.json())["choices"]
        likeliest = (sorted(top.values()) for top in choice["logprobs"]["top_logprobs"])
        return choice["token_ids"], min(top[-1] - top[-2] for top in likeliest)

    def over_http(self) -> bool:
        """Return whether the next request goes over HTTP: half of them, or all."""
        return self.target.front != STARLING or self.random.random() < 0.5

    def any_case(self, free: bool = False) -> Case:
        """Return a case by chance; with ``free``, one whose output has no required form."""
        return self.random.choice([case for case in self.cases if not (free and case.form)])

    def check(self, case: Case, output: Output) -> str:
        """Check that an output is the answer to its case; returns ANSWERED or DIFFERENT."""
        return self.check_named(case.name, output)

    def check_named(self, name: str, output: Output) -> str:
        """Check that an output is the first one with this name. Requests that the server cut short are different."""
        self.ledger.checked += 1
        tokens = output.tokens.get(0, [])
        known = self.answers.setdefault(name, tokens)
        if tokens == known and output.finished.keys() == {0} and output.finished[0] != "abort":
            return ANSWERED
        self.ledger.differences.append(f"{name}: {tokens} ({output.finished}), expected {known}")
        return DIFFERENT

    async def play(self, kind: Kind) -> None:
        """Send a request, and account for it."""
        started = time.monotonic()
        outcome, detail = await self._outcome(kind)
        self.ledger.record(kind.name, outcome, detail, kind.accepts, started, time.monotonic())

    async def _outcome(self, kind: Kind) -> tuple[str, str]:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                outcome = await kind.play(self)
                return outcome, self.ledger.differences[-1] if outcome == DIFFERENT and self.ledger.differences else ""
        except RefusedError as error:
            return error.args[0], str(error)
        except StarlingError as error:
            return error.code.name, error.message
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or ""
        except Exception as error:  # whatever it is, this request is lost, and the others go on
            return type(error).__name__, repr(error)
