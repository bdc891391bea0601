"""A trace played on vLLM's scheduler in simulated time: all decisions are real, and the model is arithmetic."""

from __future__ import annotations

import heapq
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.agents.conversation import Conversation, conversations
from benchmarks.agents.cost import Machine
from benchmarks.agents.outcome import Outcome
from benchmarks.agents.trace import Session, Shape, make_trace
from benchmarks.engine import QUIET
from benchmarks.random_llama import make_tiny_llama
from starling.config.star import parse_options
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata

PAGE, STEP = 64, 8192
TOKEN = 7  # every answer is this token, over and over


@dataclass(frozen=True)
class Setting:
    """Setting by which steps are scheduled.

    Attributes:
        ours: True for Starling's scheduler.
        star: the prompts' star options.
        threshold, adaptive: vLLM's --long-prefill-token-threshold and --long-prefill-token-threshold-adaptive.
    """

    ours: bool = False
    star: dict[str, Any] = field(default_factory=dict)
    threshold: int = 0
    adaptive: bool = False


SETTINGS: dict[str, Setting] = {
    "Starling": Setting(ours=True),
    "Starling, star": Setting(ours=True, star={"star": "auto", "star_block_size": 8192, "star_overlap_size": 0}),
    "vLLM": Setting(),
    "vLLM, threshold 2048": Setting(threshold=2048),
    "vLLM, threshold 512": Setting(threshold=512),
    "vLLM, adaptive threshold": Setting(threshold=1, adaptive=True),
}


def play(name: str, num_sessions: int, seed: int) -> dict[str, Any]:
    """Return the figures of one of SETTINGS.

    It needs a process of its own: Starling's scheduler changes vLLM's classes.
    """
    os.environ.update(QUIET)
    shape = Shape()
    trace = make_trace(shape, num_sessions, seed)
    return Simulator(Machine(), 2 * shape.compact_at, SETTINGS[name]).play(trace).summary()


def make_scheduler(machine: Machine, max_model_len: int, setting: Setting) -> tuple[Any, Any]:
    """Make vLLM's scheduler, or Starling's, for one engine; and the function that hashes a request's pages."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import core
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from starling.engine_ext.engine_core import StarScheduler
    from starling.engine_ext.start import plugin

    plugin.register()
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_llama(Path(directory) / "llama", max_position_embeddings=max_model_len)
        config = EngineArgs(
            model=str(model),
            max_num_batched_tokens=STEP,
            max_num_seqs=256,
            block_size=PAGE,
            long_prefill_token_threshold=setting.threshold,
            additional_config={"starling": {}} if setting.ours else {},
        ).create_engine_config()
        num_pages = machine.cache_tokens // PAGE
        config.cache_config.num_gpu_blocks = num_pages
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=32, dtype=torch.float32)
        scheduler = (StarScheduler if setting.ours else Scheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_pages, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=PAGE,
            hash_block_size=PAGE,
            log_stats=True,
        )
    scheduler.adaptive_long_prefill_threshold = setting.adaptive
    return scheduler, core.get_request_block_hasher(PAGE, hash_function)


class Simulator:
    """Plays the requests of sessions, one turn after the other. Time passes by ``machine.step_seconds`` alone.

    Attributes:
        live: request -> its session, and when it arrived.
        last_token: request -> when it got its last token.
    """

    def __init__(self, machine: Machine, max_model_len: int, setting: Setting) -> None:
        self.live: dict[str, tuple[Conversation, float]] = {}
        self.last_token: dict[str, float] = {}
        self.outcome = Outcome()
        self.scheduler, self.hasher = make_scheduler(machine, max_model_len, setting)
        self.machine, self.star = machine, parse_options(setting.star)
        self.now, self.count = 0.0, 0
        self.plans: dict[str, StarPlan | None] = {}

    def play(self, trace: list[Session]) -> Outcome:
        arrivals = [(each.session.start, each.number, each) for each in conversations(trace)]
        heapq.heapify(arrivals)
        self.now = begin = arrivals[0][0]
        while arrivals or self.live:
            if not self.live:
                self.now = max(self.now, arrivals[0][0])
            while arrivals and arrivals[0][0] <= self.now:
                arrived, _, conversation = heapq.heappop(arrivals)
                ids = conversation.prompt()
                self.outcome.prompt_tokens += len(ids)
                self.live[self.add(conversation, ids, arrived)] = conversation, arrived
            for conversation, pause in self.step():
                if conversation.turn is not None:
                    heapq.heappush(arrivals, (self.now + pause, conversation.number, conversation))
        self.outcome.seconds = self.now - begin
        return self.outcome

    def add(self, conversation: Conversation, ids: list[int], arrived: float) -> str:
        """Add the request of a session's next turn; returns its id."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        plan = decide(self.star, None, PromptFacts(len(ids), ids), EngineFacts(PAGE)).plan
        params = SamplingParams(
            max_tokens=conversation.turn.answer,
            ignore_eos=True,
            extra_args={KEY: RequestMetadata(plan).to_wire()} if plan is not None else None,
        )
        self.count += 1
        name = str(self.count)
        self.plans[name] = plan
        self.scheduler.add_request(Request(name, ids, params, None, arrival_time=arrived, block_hasher=self.hasher))
        return name

    def step(self) -> list[tuple[Conversation, float]]:
        """Run one step; returns the sessions whose answer has ended, and the seconds until their next turn."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        counts = output.num_scheduled_tokens
        self.now += self.machine.step_seconds((starts[name], n, self.plans[name]) for name, n in counts.items())
        self.outcome.steps += 1
        requests = {name: self.scheduler.requests[name] for name in counts}
        ends = {name: starts[name] + n >= requests[name].num_tokens for name, n in counts.items()}
        index = {"req_id_to_index": {name: number for number, name in enumerate(counts)}}
        runner = ModelRunnerOutput(
            req_ids=list(counts),
            sampled_token_ids=[[TOKEN] if ends[name] else [] for name in counts],
            **(index if "req_id_to_index" in ModelRunnerOutput.__dataclass_fields__ else {}),  # before vLLM 0.34
        )
        done = []
        for outputs in self.scheduler.update_from_output(output, runner).values():
            for one in outputs.outputs:
                name, stats = one.request_id, one.prefill_stats
                self.note(name, len(one.new_token_ids), None if stats is None else stats.num_cached_tokens)
                if one.finish_reason is not None:
                    self.outcome.preemptions += requests[name].num_preemptions
                    del self.plans[name]
                    done.append(self.end(name, [TOKEN] * requests[name].max_tokens))
        return done

    def note(self, name: str, new_tokens: int, cached_tokens: int | None) -> None:
        """Note that a request has got tokens.

        Args:
            cached_tokens: prompt tokens that were in the prefix cache; read with the first token only.
        """
        self.outcome.output_tokens += new_tokens
        if name in self.last_token:
            self.outcome.pauses.append(self.now - self.last_token[name])
        else:
            self.outcome.first_tokens.append(self.now - self.live[name][1])
            self.outcome.cached_tokens += cached_tokens or 0
        self.last_token[name] = self.now

    def end(self, name: str, answer: list[int]) -> tuple[Conversation, float]:
        """End a request; returns its session and the seconds until the next turn."""
        conversation, _ = self.live.pop(name)
        del self.last_token[name]
        return conversation, conversation.answered(answer)
