"""An engine without a model: a scheduler, and a worker whose pages hold fingerprints of KV states.

The fingerprint of a token's KV state is a hash of everything that the state depends on. It is computed from the
definition of Star Attention, not from page keys. The worker keeps requests as vLLM's model runner does: V1 takes a
request's position from each step, V2 keeps its own. The worker writes each token's fingerprint to the slot that the
scheduler gave it, and checks each fingerprint that attention would read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.random_llama import make_random_llama
from starling.engine_ext.start import plugin
from starling.scheduler.planning.plan import StarPlan, pad
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata
from starling.vllm_compat.scheduler_view import SchedulerView
from tests.model_runners import HAS_V1, runner_output
from tests.parity.harness import TINY

PAGE_SIZE = 32
HASH = get_hash_fn_by_name("sha256")
SHAPE = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}


def make_config(folder: Path, starling: dict | None = None, **arguments: Any):
    plugin.register()
    init_none_hash(HASH)
    model = make_random_llama(folder / "tiny", **TINY | {"max_position_embeddings": 8192})
    defaults = {"max_num_batched_tokens": 100, "max_num_seqs": 4, "block_size": PAGE_SIZE, "enforce_eager": True}
    arguments = {"additional_config": {"starling": starling or {}}} | defaults | arguments
    config = EngineArgs(model=str(model), **arguments).create_engine_config()
    config.cache_config.num_gpu_blocks = 40
    return config


def make_scheduler(
    config,
    scheduler_type,
    page_size: int = PAGE_SIZE,
    num_pages: int = 40,
    v2: bool = False,
    specs: Sequence[KVCacheSpec] = (),
    **spec: Any,
):
    """A scheduler with one group of full-attention layers, or with a group for each of ``specs``.

    ``spec`` replaces fields of the one group's FullAttentionSpec.
    """
    specs = specs or [FullAttentionSpec(block_size=page_size, **SHAPE | spec)]
    groups = [KVCacheGroupSpec([f"layer{index}"], one) for index, one in enumerate(specs)]
    cache = KVCacheConfig(num_blocks=num_pages, kv_cache_tensors=[], kv_cache_groups=groups)
    scheduler = scheduler_type(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=page_size,
        hash_block_size=page_size,
        log_stats=True,
    )
    if HAS_V1:
        scheduler.use_v2_model_runner = v2
    return scheduler


def make_request(
    name: str,
    plan: StarPlan | None,
    ids: list[int] | int = 300,
    page_size: int = PAGE_SIZE,
    max_tokens: int = 3,
    metadata: RequestMetadata | None = None,
    sampling: dict[str, Any] | None = None,
    **more: Any,
) -> Request:
    """A request as the engine core makes it, with the request hasher of the scheduler that was made last.

    ``sampling`` are further sampling parameters.
    """
    ids = [index % 250 for index in range(ids)] if isinstance(ids, int) else ids
    metadata = replace(metadata or RequestMetadata(), plan=plan)
    return Request(
        request_id=name,
        prompt_token_ids=ids,
        sampling_params=SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={KEY: metadata.to_wire()}, **sampling or {}
        ),
        pooling_params=None,
        block_hasher=core.get_request_block_hasher(page_size, HASH),
        **more,
    )


def random_ids(seed: int, length: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(250) for _ in range(length)]


def fingerprint(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def token_fingerprints(ids: list[int], plan: StarPlan | None, origin: object = None) -> np.ndarray:
    """(tokens,) int64: the fingerprint of each token's KV state.

    Args:
        origin: what all states depend on beside the tokens: the adapter, the tenant.
    """
    if plan and plan.documents:
        return own_position_fingerprints(ids, plan, origin)
    found = np.zeros(len(ids), dtype=np.int64)
    state = fingerprint(origin)
    for position, token in enumerate(ids):
        inside = plan is not None and plan.block_size <= position < plan.context_end
        if inside and not plan.overlap_size and position % plan.block_size == 0:
            anchor = int(found[plan.anchor_size - 1]) if plan.anchor_size else 0
            state = fingerprint("block", origin, anchor, plan.anchor_size, position)
        elif inside and position == plan.block_size:
            state = fingerprint(state, plan.block_size, plan.anchor_size, plan.overlap_size)
        elif plan is not None and position == plan.context_end:
            state = fingerprint("query", found[:position].tolist())
        state = fingerprint(state, token)
        found[position] = state
    return found


def own_position_fingerprints(ids: list[int], plan: StarPlan, origin: object) -> np.ndarray:
    """As token_fingerprints, in prompts with documents; ``ids`` have the padding."""
    found = np.zeros(len(ids), dtype=np.int64)
    starts = {start for start, _ in plan.documents if start >= plan.head_end}
    state = fingerprint(origin)
    for index, token in enumerate(ids):
        if index in starts:
            anchor = int(found[plan.anchor_size - 1]) if plan.anchor_size else 0
            state = fingerprint("own", origin, anchor, plan.anchor_size)
        elif index == plan.context_end:
            state = fingerprint("query", [found[start:stop].tolist() for start, stop in plan.documents])
        state = fingerprint(state, token)
        found[index] = state
    return found


def visible_positions(plan: StarPlan | None, start: int, end: int) -> np.ndarray:
    """The positions that the tokens ``[start, end)`` attend to."""
    keys = np.zeros(end, dtype=bool)
    for position in range(start, end):
        if plan and plan.documents:
            if position >= plan.context_end:
                keys[plan.context_end : position + 1] = True
                for first, stop in plan.documents:
                    keys[first:stop] = True
            else:
                keys[max(first for first, _ in plan.documents if first <= position) : position + 1] = True
                keys[: min(plan.anchor_size, position + 1)] = True
        elif plan is None or position >= plan.context_end:
            keys[: position + 1] = True
        else:
            own = position // plan.block_size * plan.block_size
            keys[max(0, own - plan.overlap_size) : position + 1] = True
            keys[: min(plan.anchor_size, position + 1)] = True
    return np.flatnonzero(keys)


def answer(output: Any, sampled: dict[str, list[int]]) -> ModelRunnerOutput:
    """The output of a model runner that sampled these tokens in a step."""
    names = list(output.num_scheduled_tokens)
    return runner_output(names, [sampled[name] for name in names])


def run_to_end(scheduler: Any, ahead: int = 0) -> int:
    """Step until no request is left; returns the number of computed tokens.

    Token 7 is sampled after each finished prefill.

    Args:
        ahead: steps that are scheduled before the first one's output is returned.
    """
    in_flight, computed = [], 0
    for _ in range(60):
        scheduled = scheduler.schedule()
        if scheduled.total_num_scheduled_tokens:
            computed += scheduled.total_num_scheduled_tokens
            in_flight.append(scheduled)
        if in_flight and (len(in_flight) > ahead or not scheduled.total_num_scheduled_tokens):
            step = in_flight.pop(0)
            requests = {name: scheduler.requests.get(name) for name in step.num_scheduled_tokens}
            sampled = {
                name: [] if request is None or leaves_prefill(step, request) else [7]
                for name, request in requests.items()
            }
            scheduler.update_from_output(step, answer(step, sampled))
        if not in_flight and not scheduler.has_unfinished_requests():
            return computed
    raise AssertionError("requests are left")


def leaves_prefill(step: Any, request: Request) -> bool:
    """Whether a step leaves prompt tokens of a request to be computed."""
    starts = dict(zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True))
    starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    name = request.request_id
    return starts[name] + step.num_scheduled_tokens[name] < request.num_prompt_tokens


class Engine:
    """Steps a scheduler, and runs its steps.

    Args:
        ahead: steps that are scheduled before the first one's output is returned.

    Attributes:
        computed: request -> tokens computed for it.
        cached: request -> prompt tokens that vLLM reports as cached.
        first_token: request -> steps until its first token.
        steps: the requests of each step, with their tokens.
    """

    def __init__(self, scheduler: Any, *, ahead: int = 0, page_size: int = PAGE_SIZE) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.ahead, self.page_size, self.v2 = ahead, page_size, SchedulerView(scheduler).has_v2_runner
        self.memory = np.zeros((len(self.pool.blocks), page_size), dtype=np.int64)
        self.plans: dict[str, StarPlan | None] = {}
        self.prompts: dict[str, list[int]] = {}
        self.hits = self.queries = 0
        self.fingerprints: dict[str, np.ndarray] = {}
        self.page_ids: dict[str, list[int]] = {}
        self.positions: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.first_token: dict[str, int] = {}
        self.steps: list[dict[str, int]] = []
        self.in_flight: list[tuple[Any, dict[str, list[int]]]] = []

    def add(self, name: str, plan: StarPlan | None, ids: list[int] | int = 300, **more: Any) -> Request:
        if (plan and plan.documents) and not isinstance(ids, int):
            ids = pad(plan, ids)  # as the engine core does
        request = make_request(name, plan, ids, self.page_size, **more)
        self.plans[name], self.prompts[name] = plan, list(request.prompt_token_ids)
        self.computed[name] = 0
        self.fingerprints.pop(name, None)
        self.scheduler.add_request(request)
        return request

    def step(self) -> bool:
        """Schedule and run one step, and return the output of one step to the scheduler; False: nothing was to do."""
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.in_flight.append((output, self._run(output)))
            self.steps.append(dict(output.num_scheduled_tokens))
        else:
            self._forget(output)
        done = len(self.in_flight) > self.ahead or (self.in_flight and not output.total_num_scheduled_tokens)
        if done:
            self._update(*self.in_flight.pop(0))
        return bool(done or output.total_num_scheduled_tokens)

    def run(self, limit: int = 500) -> None:
        """Step until no request is left, at most ``limit`` times."""
        for _ in range(limit):
            self.step()
            if not self.in_flight and not self.scheduler.has_unfinished_requests():
                return
        raise AssertionError(f"unfinished after {limit} steps: {list(self.scheduler.requests)}")

    def run_until(self, condition: Callable[[], bool], limit: int = 500) -> None:
        """Step until something holds, at most ``limit`` times."""
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"not within {limit} steps")

    def _forget(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self.page_ids.pop(name, None)
            self.positions.pop(name, None)

    def _run(self, output: Any) -> dict[str, list[int]]:
        """Do the work of the model runner; returns the sampled tokens."""
        self._forget(output)
        for new in output.scheduled_new_reqs:
            self.page_ids[new.req_id], self.positions[new.req_id] = list(new.block_ids[0]), new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, new_ids, position in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            resumed = name in getattr(cached, "resumed_req_ids", ())
            assert not (self.v2 and resumed), "V2 resumes requests as new ones"
            if resumed:
                self.page_ids[name] = []
            if new_ids is not None:
                self.page_ids[name] += new_ids[0]
            if self.v2:
                assert self.positions[name] == position, "V2 keeps a request's position on the device"
            self.positions[name] = position
        spans = {}
        for name, count in output.num_scheduled_tokens.items():
            start = self.positions[name]
            spans[name] = (start, start + count)
            self.positions[name] = start + count
            self.computed[name] += count
            expected, slots = self._expected(name, start + count), self._slots(name, start + count)
            self.memory[slots[0][start:], slots[1][start:]] = expected[start:]
        for name, (start, end) in spans.items():
            expected, slots = self._expected(name, end), self._slots(name, end)
            keys = visible_positions(self.plans[name], start, end)
            read = self.memory[slots[0][keys], slots[1][keys]]
            wrong = keys[read != expected[keys]]
            assert not len(wrong), f"{name} reads wrong KV at positions {wrong[:5]} in its step from {start} to {end}"
        sampled = {}
        for name, (_, end) in spans.items():
            request = self.scheduler.requests[name]
            sampled[name] = [7] if end >= request.num_tokens else []
        return sampled

    def _expected(self, name: str, end: int) -> np.ndarray:
        if name not in self.fingerprints:
            outputs = [7] * self.scheduler.requests[name].max_tokens
            self.fingerprints[name] = token_fingerprints(self.prompts[name] + outputs, self.plans[name])
        return self.fingerprints[name][:end]

    def _slots(self, name: str, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(end)
        return np.array(self.page_ids[name])[positions // self.page_size], positions % self.page_size

    def _update(self, output: Any, sampled: dict[str, list[int]]) -> None:
        for outputs in self.scheduler.update_from_output(output, self._answer(output, sampled)).values():
            stats = outputs.scheduler_stats and outputs.scheduler_stats.prefix_cache_stats
            if stats:
                self.hits, self.queries = self.hits + stats.hits, self.queries + stats.queries
            for one in outputs.outputs:
                if one.prefill_stats is not None:
                    self.cached[one.request_id] = one.prefill_stats.num_cached_tokens
                    self.first_token[one.request_id] = len(self.steps)

    def _answer(self, output: Any, sampled: dict[str, list[int]]) -> ModelRunnerOutput:
        return answer(output, sampled)

    def check_pages(self) -> None:
        """Assert that each page is free or held by requests, with the right reference count."""
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
