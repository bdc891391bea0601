"""A trace played on an engine in this process, with a small random model: what the simulator says, measured."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.agents.conversation import Conversation
from benchmarks.agents.cost import Machine
from benchmarks.agents.playback import Playback
from benchmarks.agents.simulator import STEP, Setting
from benchmarks.agents.trace import Shape, make_trace, summary
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


class Player(Playback):
    """Plays a trace. Its time is that of this process on its core, and leaps where no request is live."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.leapt = engine, 0.0

    def time(self) -> float:
        return time.process_time() + self.leapt

    def leap_to(self, moment: float) -> None:
        self.leapt += max(0.0, moment - self.time())

    def add(self, conversation: Conversation, ids: list[int], arrived: float) -> str:
        return self.engine.add(ids, conversation.turn.answer)

    def step(self) -> list[tuple[Conversation, float]]:
        outputs = self.engine.llm.llm_engine.step()
        self.outcome.steps += 1
        for output in outputs:
            self.note(output.request_id, 1, output.num_cached_tokens)
        return [self.end(each.request_id, list(each.outputs[0].token_ids)) for each in outputs if each.finished]


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
