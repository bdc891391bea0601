"""An engine without a model: a scheduler, and a worker whose pages hold fingerprints of what a KV state follows from.

The worker keeps requests as vLLM's runner does (V1 takes a request's place from each step, V2 keeps its own), writes
every token's fingerprint where the scheduler said, and checks each one that attention would read. What a state
follows from is worked out from Star Attention's definition, not from page keys.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.random_llama import make_random_llama
from engine_ext import plugin
from scheduler.plan import PLAN_KEY, StarPlan
from tests.parity.harness import TINY

PAGE = 32
HASH = get_hash_fn_by_name("sha256")


def make_config(folder: Path, starling: dict | None = None, **arguments: Any):
    plugin.register()
    init_none_hash(HASH)
    model = make_random_llama(folder / "tiny", **TINY | {"max_position_embeddings": 8192})
    defaults = {"max_num_batched_tokens": 100, "max_num_seqs": 4, "block_size": PAGE, "enforce_eager": True}
    given = {"additional_config": {"starling": starling or {}}} | defaults | arguments
    made = EngineArgs(model=str(model), **given).create_engine_config()
    made.cache_config.num_gpu_blocks = 40
    return made


def make_scheduler(config, scheduler_type, page: int = PAGE, pages: int = 40, v2: bool = False, **spec: Any):
    made_of = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32} | spec
    spec = FullAttentionSpec(block_size=page, **made_of)
    cache = KVCacheConfig(num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    made = scheduler_type(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=page,
        hash_block_size=page,
        log_stats=True,
    )
    made.use_v2_model_runner = v2
    return made


def make_request(
    name: str,
    plan: StarPlan | None,
    ids: list[int] | int = 300,
    page: int = PAGE,
    max_tokens: int = 3,
    extra: dict[str, Any] | None = None,
    **more: Any,
) -> Request:
    """A request as the engine core makes it, with the hasher that the last scheduler made asked for."""
    ids = [index % 250 for index in range(ids)] if isinstance(ids, int) else ids
    extra = ({} if plan is None else {PLAN_KEY: plan.to_wire()}) | (extra or {})
    return Request(
        request_id=name,
        prompt_token_ids=ids,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra),
        pooling_params=None,
        block_hasher=core.get_request_block_hasher(page, HASH),
        **more,
    )


def random_ids(seed: int, length: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(250) for _ in range(length)]


def fingerprint(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def cold(ids: list[int], plan: StarPlan | None) -> np.ndarray:
    """What each token's KV follows from, in a run without a cache: int64, one a token."""
    found = np.zeros(len(ids), dtype=np.int64)
    state = 0
    for position, token in enumerate(ids):
        inside = plan is not None and plan.block_size <= position < plan.context_end
        if inside and not plan.overlap_size and position % plan.block_size == 0:
            anchor = int(found[plan.anchor_size - 1]) if plan.anchor_size else 0
            state = fingerprint("block", anchor, plan.anchor_size, position)
        elif inside and position == plan.block_size:
            state = fingerprint(state, plan.block_size, plan.anchor_size, plan.overlap_size)
        elif plan is not None and position == plan.context_end:
            everything = found[:position].tolist()
            state = fingerprint("query", everything)
        state = fingerprint(state, token)
        found[position] = state
    return found


def read_by(plan: StarPlan | None, start: int, end: int) -> np.ndarray:
    """Positions that the tokens ``[start, end)`` attend to."""
    keys = np.zeros(end, dtype=bool)
    for position in range(start, end):
        if plan is None or position >= plan.context_end:
            keys[: position + 1] = True
        else:
            own = position // plan.block_size * plan.block_size
            keys[max(0, own - plan.overlap_size) : position + 1] = True
            keys[: min(plan.anchor_size, position + 1)] = True
    return np.flatnonzero(keys)


def answer(output: Any, sampled: dict[str, list[int]]) -> ModelRunnerOutput:
    """What a runner that sampled these tokens gives back for a step."""
    names = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[sampled[name] for name in names],
    )


def run_to_end(scheduler: Any, ahead: int = 0) -> int:
    """Step until nothing is left, ``ahead`` steps scheduled before the first is answered; returns computed tokens.

    Token 7 is sampled after each finished prefill.
    """
    flying, computed = [], 0
    for _ in range(60):
        scheduled = scheduler.schedule()
        if scheduled.total_num_scheduled_tokens:
            computed += scheduled.total_num_scheduled_tokens
            flying.append(scheduled)
        if flying and (len(flying) > ahead or not scheduled.total_num_scheduled_tokens):
            step = flying.pop(0)
            requests = {name: scheduler.requests.get(name) for name in step.num_scheduled_tokens}
            sampled = {
                name: [] if request is None or step_is_prefill(step, request, name) else [7]
                for name, request in requests.items()
            }
            scheduler.update_from_output(step, answer(step, sampled))
        if not flying and not scheduler.has_unfinished_requests():
            return computed
    raise AssertionError("requests are left")


def step_is_prefill(step: Any, request: Request, name: str) -> bool:
    starts = dict(zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True))
    starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    return starts[name] + step.num_scheduled_tokens[name] < request.num_prompt_tokens


class Engine:
    """Steps a scheduler; ``ahead`` steps are scheduled before the first is answered."""

    def __init__(self, scheduler: Any, *, ahead: int = 0, page: int = PAGE) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.ahead, self.page, self.v2 = ahead, page, scheduler.use_v2_model_runner
        self.memory = np.zeros((len(self.pool.blocks), page), dtype=np.int64)
        self.plans: dict[str, StarPlan | None] = {}
        self.prompts: dict[str, list[int]] = {}
        self.hits = self.queries = 0
        self.wanted: dict[str, np.ndarray] = {}
        self.tables: dict[str, list[int]] = {}
        self.places: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.first_token: dict[str, int] = {}
        self.steps: list[dict[str, int]] = []
        self.flying: list[tuple[Any, dict[str, list[int]]]] = []

    def add(self, name: str, plan: StarPlan | None, ids: list[int] | int = 300, **more: Any) -> Request:
        request = make_request(name, plan, ids, self.page, **more)
        self.plans[name], self.prompts[name] = plan, list(request.prompt_token_ids)
        self.computed[name] = 0
        self.wanted.pop(name, None)
        self.scheduler.add_request(request)
        return request

    def step(self) -> bool:
        """Schedule, run and answer one step; False: there was nothing to do."""
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.flying.append((output, self._run(output)))
            self.steps.append(dict(output.num_scheduled_tokens))
        else:
            self._forget(output)
        done = len(self.flying) > self.ahead or (self.flying and not output.total_num_scheduled_tokens)
        if done:
            self._answer(*self.flying.pop(0))
        return bool(done or output.total_num_scheduled_tokens)

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            self.step()
            if not self.flying and not self.scheduler.has_unfinished_requests():
                return
        raise AssertionError(f"unfinished after {limit} steps: {list(self.scheduler.requests)}")

    def _forget(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self.tables.pop(name, None)
            self.places.pop(name, None)

    def _run(self, output: Any) -> dict[str, list[int]]:
        """What the model runner does; returns the tokens sampled."""
        self._forget(output)
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id], self.places[new.req_id] = list(new.block_ids[0]), new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, fresh, place in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            resumed = name in cached.resumed_req_ids
            assert not (self.v2 and resumed), "V2 resumes requests as new ones"
            if resumed:
                self.tables[name] = []
            if fresh is not None:
                self.tables[name] += fresh[0]
            if self.v2:
                assert self.places[name] == place, "V2 keeps a request's place on the device"
            self.places[name] = place
        spans = {}
        for name, count in output.num_scheduled_tokens.items():
            start = self.places[name]
            spans[name] = (start, start + count)
            self.places[name] = start + count
            self.computed[name] += count
            want, slots = self._expected(name, start + count), self._slots(name, start + count)
            self.memory[slots[0][start:], slots[1][start:]] = want[start:]
        for name, (start, end) in spans.items():
            want, slots = self._expected(name, end), self._slots(name, end)
            keys = read_by(self.plans[name], start, end)
            got = self.memory[slots[0][keys], slots[1][keys]]
            wrong = keys[got != want[keys]]
            assert not len(wrong), f"{name} reads KV that is not its own at {wrong[:5]}, computing {start} to {end}"
        sampled = {}
        for name, (_, end) in spans.items():
            request = self.scheduler.requests[name]
            sampled[name] = [7] if end >= request.num_tokens else []
        return sampled

    def _expected(self, name: str, end: int) -> np.ndarray:
        if name not in self.wanted:
            outputs = [7] * self.scheduler.requests[name].max_tokens
            self.wanted[name] = cold(self.prompts[name] + outputs, self.plans[name])
        return self.wanted[name][:end]

    def _slots(self, name: str, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(end)
        return np.array(self.tables[name])[positions // self.page], positions % self.page

    def _answer(self, output: Any, sampled: dict[str, list[int]]) -> None:
        for outputs in self.scheduler.update_from_output(output, answer(output, sampled)).values():
            stats = outputs.scheduler_stats and outputs.scheduler_stats.prefix_cache_stats
            if stats:
                self.hits, self.queries = self.hits + stats.hits, self.queries + stats.queries
            for one in outputs.outputs:
                if one.prefill_stats is not None:
                    self.cached[one.request_id] = one.prefill_stats.num_cached_tokens
                    self.first_token[one.request_id] = len(self.steps)

    def check_pages(self) -> None:
        """Every page is free or held, as often as it is referred to."""
        held: dict[int, int] = {}
        for pages in self.manager.req_to_blocks.values():
            for page in pages:
                held[page.block_id] = held.get(page.block_id, 0) + 1
        free = [page.block_id for page in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.pool.get_num_free_blocks()
        for page in self.pool.blocks:
            if not page.is_null:
                assert page.ref_cnt == held.get(page.block_id, 0)
                assert (page.ref_cnt == 0) == (page.block_id in set(free))
