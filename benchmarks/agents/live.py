"""A trace played on an engine in this process, with a small random model: what the simulator says, measured."""

from __future__ import annotations

import heapq
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.agents.conversation import Conversation, conversations
from benchmarks.agents.cost import Machine
from benchmarks.agents.outcome import Outcome
from benchmarks.agents.simulator import STEP, Setting
from benchmarks.agents.trace import Session, Shape, make_trace, summary
from benchmarks.fairness import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.star_ttft import PAGE_SIZE, RANDOM_LLAMA

FACTOR = 16
"""Sizes and times of the trace, the step and the KV cache are divided by this."""
SETTINGS: dict[str, Setting] = {
    "Starling": Setting(ours=True),
    "vLLM": Setting(),
    "vLLM, threshold 128": Setting(threshold=2048 // FACTOR),
    "vLLM, threshold 32": Setting(threshold=512 // FACTOR),
    "vLLM, adaptive threshold": Setting(threshold=1, adaptive=True),
}


class Player:
    """Plays a trace. Its time is that of this process on its core, and leaps where no request is live."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.leapt = engine, 0.0
        self.live: dict[str, tuple[Conversation, float]] = {}
        self.last_token: dict[str, float] = {}
        self.outcome = Outcome()

    @property
    def now(self) -> float:
        return time.process_time() + self.leapt

    def play(self, trace: list[Session]) -> Outcome:
        begin = self.now
        arrivals = [(begin + each.session.start, each.number, each) for each in conversations(trace)]
        heapq.heapify(arrivals)
        self.leapt += arrivals[0][0] - begin
        begin = arrivals[0][0]
        while arrivals or self.live:
            if not self.live:
                self.leapt += max(0.0, arrivals[0][0] - self.now)
            while arrivals and arrivals[0][0] <= self.now:
                arrived, _, conversation = heapq.heappop(arrivals)
                ids = conversation.prompt()
                self.outcome.prompt_tokens += len(ids)
                self.live[self.engine.add(ids, conversation.turn.answer)] = conversation, arrived
            for conversation, pause in self._step():
                if conversation.turn is not None:
                    heapq.heappush(arrivals, (self.now + pause, conversation.number, conversation))
        self.outcome.seconds = self.now - begin
        return self.outcome

    def _step(self) -> list[tuple[Conversation, float]]:
        """Run one step; returns the sessions whose answer has ended, and the seconds until their next turn."""
        outputs = self.engine.llm.llm_engine.step()
        now, done = self.now, []
        self.outcome.steps += 1
        for output in outputs:
            name, (choice,) = output.request_id, output.outputs
            conversation, arrived = self.live[name]
            before = self.last_token.get(name)
            self.outcome.note(now, arrived, before, 1)
            if before is None:
                self.outcome.cached_tokens += output.num_cached_tokens
            self.last_token[name] = now
            if output.finished:
                del self.live[name], self.last_token[name]
                done.append((conversation, conversation.answered(list(choice.token_ids))))
        return done


def play_all(names: list[str], num_sessions: int, seed: int) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The trace's summary, and the figures of each of these SETTINGS, one after the other on one engine."""
    shape = Shape().scaled(FACTOR)
    trace = make_trace(shape, num_sessions, seed)
    with tempfile.TemporaryDirectory() as directory:
        engine = Engine.start(
            make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA),
            max_num_batched_tokens=STEP // FACTOR,
            max_model_len=2 * shape.compact_at,
            num_gpu_blocks_override=Machine().cache_tokens // FACTOR // PAGE_SIZE,
            enable_prefix_caching=True,
        )
        rows = {}
        for name in names:
            setting = SETTINGS[name]
            engine.schedule(setting.ours, setting.threshold, setting.adaptive)
            engine.llm.reset_prefix_cache()
            rows[name] = Player(engine).play(trace).summary()
    return summary(trace), rows
