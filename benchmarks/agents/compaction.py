"""Sessions that are summarised and start anew, beside other requests: how many tokens of their prompts are computed.

The schedulers are the real ones, with their prefix caches; nothing is timed. A session's messages grow to 95,000
tokens. Then it goes on from a summary and its last messages, as they were. Between two turns of a session, requests of
others pass through the server, more than its memory holds.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.agents.cost import Machine
from benchmarks.agents.simulator import PAGE, TOKEN, Setting, make_scheduler
from benchmarks.engine import QUIET
from benchmarks.report import saved_figure

HEAD, MESSAGE, ANSWER, SUMMARY = 12_000, 1_900, 440, 2_000
COMPACT_AT, KEPT_MESSAGES = 95_000, 10
SESSIONS, TURNS = 3, 70
OTHERS, OTHER_TOKENS = 24, 30_000
"""Requests of others between two turns of a session."""

CACHE_TOKENS = 600_000
DOCUMENTS = {"star": "on", "star_block_size": 8192}


@dataclass(frozen=True)
class Served:
    """Way in which a session is served.

    Attributes:
        setting: the scheduler, and star options.
        has_session_id: True if its requests say which session they are of.
    """

    setting: Setting
    has_session_id: bool = False


SERVED = {
    "vLLM": Served(Setting()),
    "documents": Served(Setting(ours=True, star=DOCUMENTS)),
    "dense, session_id": Served(Setting(ours=True), has_session_id=True),
    "documents, session_id": Served(Setting(ours=True, star=DOCUMENTS), has_session_id=True),
}


@dataclass
class Talk:
    """One session: its messages so far, each a list of token ids.

    Attributes:
        started_anew: True if the next turn is the first one after a summary.
    """

    number: int
    messages: list[list[int]] = field(default_factory=list)
    started_anew: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.number)

    def tokens(self, count: int) -> list[int]:
        return self.random.choices(range(250), k=count)

    def turn(self, head: list[int]) -> list[list[int]]:
        """Return the head and the messages of the next prompt."""
        self.started_anew = sum(map(len, self.messages)) + len(head) > COMPACT_AT
        if self.started_anew:
            self.messages = [self.tokens(SUMMARY), *self.messages[-KEPT_MESSAGES:]]
        self.messages.append(self.tokens(self.random.randrange(MESSAGE // 2, MESSAGE * 3 // 2)))
        return [head, *self.messages]


class Server:
    """One scheduler; each request runs alone, to its end."""

    def __init__(self, served: Served) -> None:
        self.served = served
        machine = Machine(cache_tokens=CACHE_TOKENS)
        self.scheduler, self.hasher = make_scheduler(machine, 2 * COMPACT_AT, served.setting)
        self.count = 0

    def ask(self, messages: Sequence[list[int]], answer: int, session: int | None = None) -> int:
        """Run a prompt; returns how many of its tokens were computed."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request

        from starling.config.star import parse_options
        from starling.scheduler.planning.decide import decide
        from starling.scheduler.planning.facts import EngineFacts, PromptFacts
        from starling.scheduler.planning.plan import pad
        from starling.scheduler.planning.request_metadata import KEY, RequestMetadata

        ids = [token for message in messages for token in message]
        plan = None
        if self.served.setting.star and len(messages) > 2:
            starts = list(accumulate(map(len, messages)))[:-1]
            options = parse_options(self.served.setting.star | {"star_segments": starts})
            plan = decide(options, None, PromptFacts(len(ids), ids), EngineFacts(PAGE)).plan
        self.count += 1
        name = str(self.count)
        extra_args = {KEY: RequestMetadata(plan).to_wire()} if self.served.setting.ours else None
        params = SamplingParams(max_tokens=answer, ignore_eos=True, extra_args=extra_args)
        named = f"session {session}" if session is not None and self.served.has_session_id else None
        engine_ids = ids if plan is None else pad(plan, ids)
        request = Request(name, engine_ids, params, None, block_hasher=self.hasher, session_id=named)
        self.scheduler.add_request(request)
        computed = 0
        while not request.is_finished():
            output = self.scheduler.schedule()
            computed += output.total_num_scheduled_tokens
            ends = request.num_computed_tokens >= request.num_tokens
            runner = ModelRunnerOutput([name], {name: 0}, sampled_token_ids=[[TOKEN] if ends else []])
            self.scheduler.update_from_output(output, runner)
        return computed - (answer - 1)


def play(name: str) -> dict[str, float]:
    """Return the mean tokens that a turn computes, of one of SERVED. It needs a process of its own."""
    os.environ.update(QUIET)
    server = Server(SERVED[name])
    others = random.Random(-2)
    head = random.Random(-1).choices(range(250), k=HEAD)
    talks = [Talk(number) for number in range(SESSIONS)]
    for talk in talks:  # each starts from a long conversation
        talk.messages = [talk.tokens(MESSAGE) for _ in range((COMPACT_AT - HEAD) * 3 // 4 // MESSAGE)]
    turns: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for turn in range(TURNS):
        for talk in talks:
            messages = talk.turn(head)
            computed = server.ask(messages, ANSWER, talk.number)
            talk.messages.append([TOKEN] * ANSWER)
            if turn:
                turns[talk.started_anew].append((computed, sum(map(len, messages))))
            for _ in range(OTHERS // SESSIONS):
                server.ask([others.choices(range(250), k=OTHER_TOKENS)], 8)
    return dict(figures(turns))


def figures(turns: dict[bool, list[tuple[int, int]]]) -> Iterator[tuple[str, float]]:
    for started_anew, key in ((False, "turn"), (True, "after a summary")):
        rows = turns[started_anew]
        yield f"{key}: tokens", sum(tokens for _, tokens in rows) / len(rows)
        yield f"{key}: computed", sum(computed for computed, _ in rows) / len(rows)
        yield f"{key}: turns", len(rows)


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    with saved_figure(path, 1, 1, figsize=(7, 3)) as (_, axis):
        for offset, key in ((-0.2, "turn"), (0.2, "after a summary")):
            places = [index + offset for index in range(len(rows))]
            axis.barh(places, [row[f"{key}: computed"] for row in rows.values()], 0.4, label=key)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_xlabel("tokens computed, of a mean prompt")
        axis.legend(frameon=False)


def summary(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    constants = {"sessions": SESSIONS, "turns": TURNS, "cache_tokens": CACHE_TOKENS, "compact_at": COMPACT_AT}
    return constants | {"kept_messages": KEPT_MESSAGES, "others_between_turns": OTHERS * OTHER_TOKENS, "rows": rows}
