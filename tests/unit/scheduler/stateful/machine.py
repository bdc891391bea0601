"""The rules: requests come, steps run, and everything that may happen to a request happens."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from starling.scheduler.planning.request_metadata import RequestMetadata, metadata_of
from tests.stateful import CountingMachine
from tests.unit.scheduler.stateful.cases import Case, make_case
from tests.unit.scheduler.stateful.checks import PageKeys, check_empty, check_pages, check_queues
from tests.unit.scheduler.stateful.requests import (
    DOCUMENTS,
    MAX_ANSWERS,
    Options,
    Sizes,
    asked,
    fetching,
    options,
    pairs_of_sizes,
    part,
    prompts,
    stars,
)
from tests.unit.scheduler.stateful.runner import Runner
from tests.unit.scheduler.stateful.setup import MAX_TOKENS, PAGE_SIZE, setups

MAX_LIVE = 10
connected = precondition(lambda self: self.setup.connector)
has_room = precondition(lambda self: len(self.live) < MAX_LIVE)
is_busy = precondition(lambda self: self.scheduler.requests or self.in_flight)


class SchedulerMachine(CountingMachine):
    """One scheduler, its runner, and its requests.

    Attributes:
        config: vLLM's, set by the test, as is ``kind``: one of KINDS.
        taken: pages that the machine holds, so that requests are preempted.
        held: names of the parts of prompts that have been answered with pages, and not been released.
    """

    config: ClassVar[Any] = None
    kind: ClassVar[str] = "any"

    @initialize(data=st.data(), sizes=pairs_of_sizes())
    def start(self, data: Any, sizes: list[Sizes]) -> None:
        self.sizes = sizes
        self.setup = setup = data.draw(setups(self.kind))
        self.scheduler = setup.make(self.config)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.cases: dict[str, Case] = {}
        v2 = self.scheduler.view.has_v2_runner
        self.runner = Runner(setup.specs, setup.num_pages, PAGE_SIZE, v2, self.cases)
        self.keys = PageKeys(self.runner)
        self.numbers = count()
        self.in_flight: list[list[Any]] = []  # steps, and what the runner has returned for each; None: it has not run
        self.ended_loads: list[Any] = []
        self.taken: list[Any] = []
        self.held: set[str] = set()
        self.throttled = 0
        self.totals["runs"] += 1

    @property
    def live(self) -> list[str]:
        return [name for name, case in self.cases.items() if case.ended is None]

    # Requests.

    def _add(self, ids: list[int], given: Options, seed: int, metadata: RequestMetadata, name: str = "") -> None:
        number = next(self.numbers)
        adapter = given.adapter if self.setup.max_loras is not None else 0
        metadata = replace(metadata, retention=given.retained(metadata.plan))
        case = make_case(
            name or f"r{number}",
            ids,
            given.answers(seed) if metadata.part is None else [1],
            metadata,
            PAGE_SIZE,
            given.grammar and metadata.part is None,
            priority=given.priority if self.setup.policy == "priority" else 0,
            arrival_time=float(number),
            cache_salt=given.salt,
            session_id=given.session,
            lora_request=LoRARequest(f"adapter{adapter}", adapter, "/adapter") if adapter else None,
        )
        self.cases[case.name] = case
        self.scheduler.add_request(case.request)
        self.totals["requests"] += 1

    @has_room
    @rule(requests=st.lists(asked, min_size=1, max_size=4))
    def add(self, requests):
        for prompt, given, star in requests:
            for seed in given.seeds:
                self._add(prompt.ids, given, seed, self._metadata(star, prompt.length))

    @has_room
    @precondition(lambda self: self.cases)
    @rule(data=st.data(), given=options, places=st.lists(st.integers(0, MAX_TOKENS), max_size=2), same=st.booleans())
    def add_edited(self, data, given, places, same):
        """A prompt comes again, edited: star blocks that are cached behind the edit are adopted."""
        case = self.cases[data.draw(st.sampled_from(list(self.cases)))]
        ids, metadata = list(case.request.prompt_token_ids), metadata_of(case.request)
        for place in places:
            ids[place % len(ids)] = 252
        given = replace(given, salt=case.request.cache_salt) if same else given
        whole = metadata.plan is None or metadata.plan.num_prompt_tokens == len(ids)
        self._add(ids, given, 0, RequestMetadata(metadata.plan if whole else None))

    @has_room
    @precondition(lambda self: len(self.live) < len(self.cases))
    @rule(data=st.data(), given=options, star=stars)
    def add_next_turn(self, data, given, star):
        """A chat goes on: its prompt, its answer, and a question."""
        before = data.draw(st.sampled_from([name for name, case in self.cases.items() if case.ended]))
        case = self.cases[before]
        ids = [*case.request.prompt_token_ids, *case.received, *DOCUMENTS[1]][: MAX_TOKENS - MAX_ANSWERS]
        self._add(ids, given, 0, self._metadata(star, len(ids)))

    def _metadata(self, star: int | None, num_tokens: int) -> RequestMetadata:
        return RequestMetadata(
            None if star is None else self.sizes[star].plan(num_tokens, self.setup.has_only_full_attention)
        )

    @connected
    @has_room
    @rule(prompt=prompts, given=options, star=st.integers(0, 1), first=st.integers(0, 3), num_blocks=st.integers(1, 3))
    def add_part(self, prompt, given, star, first, num_blocks):
        name = f"part{next(self.numbers)}"
        made = part(name, self.sizes[star].independent_plan(prompt.length), first, num_blocks)
        if made is not None:
            self._add(prompt.ids[: made[0]], given, 0, made[1], name)

    @connected
    @has_room
    @rule(prompt=prompts, given=options, star=st.integers(0, 1), own_start=st.booleans())
    def add_fetching(self, prompt, given, star, own_start):
        ids, plan = prompt.ids, self.sizes[star].independent_plan(prompt.length)
        if own_start and plan.block_size < len(ids):
            self._add(ids[: plan.block_size + 1], given, 0, RequestMetadata())
            self._steps(4)
        edited = [*ids[: plan.block_size], *((token + 1) % 250 for token in ids[plan.block_size :])]
        self._add(edited, given, 0, RequestMetadata(plan) if (len(plan.starts) < 2) else fetching(plan))

    @precondition(lambda self: self.cases)
    @rule(data=st.data(), in_step=st.booleans())
    def abort(self, data, in_step):
        """Abort a request, which may have ended already, between two steps or while one runs."""
        names = data.draw(st.lists(st.sampled_from(list(self.cases)), min_size=1, max_size=2))
        if in_step:
            self._step(names)
        else:
            self._abort(names)

    def _abort(self, names: list[str] | None) -> None:
        expected = set(self.live if names is None else names) & set(self.live)
        ended = self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        assert {request.request_id for request in ended} == expected
        for name in expected:
            self.keys.learn(self.cases[name])
            self.cases[name].ended = "abort"
            self.totals["preemptions"] += self.cases[name].request.num_preemptions
        self.totals["aborts"] += len(expected)

    @precondition(lambda self: self._uncompiled())
    @rule(data=st.data(), limit=st.sampled_from([99, 99, 2]), fails=st.sampled_from([False, False, True]))
    def compile_grammar(self, data, limit, fails):
        data.draw(st.sampled_from(self._uncompiled())).compile(limit, fails)

    def _uncompiled(self) -> list[Case]:
        return [case for case in self.cases.values() if case.grammar is not None and not case.grammar.done()]

    # Steps.

    @is_busy
    @rule(times=st.integers(1, 3))
    def step(self, times):
        self._steps(times)

    @is_busy
    @rule(times=st.integers(4, 12))
    def many_steps(self, times):
        self._steps(times)

    def _steps(self, times: int) -> None:
        for _ in range(times):
            self._step([])

    def _step(self, aborted: list[str]) -> None:
        """As the engine core steps: with async scheduling, a step is scheduled before the one before it returns."""
        if not self.scheduler.has_requests():
            if self.in_flight:
                self._return_step()
            return
        self.throttled = (self.throttled + 1) % self.setup.interval
        output = self.scheduler.schedule(throttle_prefills=self.throttled > 0)
        self._check_step(output)
        self.in_flight.append([output, None])
        if not self.setup.late:
            self._run_steps()
        if aborted:
            self._abort(aborted)
        if len(self.in_flight) > self.setup.is_async or not output.total_num_scheduled_tokens:
            self._return_step()
        self.no_page_of_the_prefix_cache_is_wrong()

    def _run_steps(self) -> None:
        for step in self.in_flight:
            if step[1] is None:
                step[1] = self.runner.run(step[0])

    def _return_step(self) -> None:
        output, returned = self.in_flight[0]
        returned = returned or self.runner.run(output)
        del self.in_flight[0]
        returned.kv_connector_output = self.ended_loads.pop(0) if self.ended_loads else None
        for outputs in self.scheduler.update_from_output(output, returned).values():
            for one in outputs.outputs:
                self._accept(self.cases[one.request_id], one)
        self.totals["steps"] += 1

    def _accept(self, case: Case, output: Any) -> None:
        case.accept(output)
        if case.ended is None:
            return
        self.keys.learn(case)
        self.totals["preemptions"] += case.request.num_preemptions
        self.totals["cached tokens"] += case.cached or 0
        if case.held is not None:
            self.held.add(case.held["name"])
            positions = range(case.held["source"]["start"], case.num_prompt_tokens)
            held = self.runner.memory[case.held["source"]["page_ids"]].ravel()
            assert (held == case.states[positions.start : positions.stop]).all(), f"{case.name} holds other pages"
        elif case.cached is not None and metadata_of(case.request).fetch is None:
            # Pages that are adopted just before a preemption count as hits, and never reach the runner.
            exact = case.cached == case.skipped_of_client or (case.preempted and case.skipped_of_client < case.cached)
            assert exact and case.cached < case.num_prompt_tokens, f"{case.name} reports {case.cached} hits"

    def _check_step(self, output: Any) -> None:
        counts = output.num_scheduled_tokens
        assert sum(counts.values()) == output.total_num_scheduled_tokens <= self.setup.step_tokens
        assert set(counts) <= set(self.live) and len(counts) <= self.setup.max_num_seqs
        sent = [new.req_id for new in output.scheduled_new_reqs] + output.scheduled_cached_reqs.req_ids
        assert sorted(sent) == sorted(counts), "a step sends each of its requests once"
        adapters = {lora.lora_int_id for name in counts if (lora := self.cases[name].request.lora_request)}
        assert self.setup.max_loras is None or len(adapters) <= self.setup.max_loras
        assert not counts or self.scheduler.pause_state != PauseState.PAUSED_ALL

    # What happens to the scheduler.

    @is_busy
    @rule(left=st.integers(0, 6))
    def take_pages(self, left):
        """Memory gets tight: running requests that need a page are preempted."""
        self.taken += self.pool.get_new_blocks(max(0, self.pool.get_num_free_blocks() - left))

    @precondition(lambda self: self.taken)
    @rule()
    def give_pages_back(self):
        self.pool.free_blocks(self.taken)
        self.taken = []

    @precondition(lambda self: self.scheduler.running)
    @rule(left=st.integers(0, 6), times=st.integers(1, 8))
    def steps_with_few_pages(self, left, times):
        self.take_pages(left)
        self._steps(times)
        self.give_pages_back()

    @has_room
    @precondition(lambda self: self.setup.policy == "priority")
    @rule(long=prompts, urgent=prompts, given=options, times=st.integers(1, 5), left=st.integers(1, 6))
    def add_urgent(self, long, urgent, given, times, left):
        """An urgent request comes while a long prompt is prefilled, and takes its pages."""
        given = replace(given, salt=f"unseen{len(self.cases)}", grammar=False)
        self._add(long.ids, replace(given, priority=2), 0, RequestMetadata())
        self._steps(times)
        self._add(urgent.ids, replace(given, priority=0), 1, RequestMetadata())
        self._steps(2)
        for _ in range(8):
            self.steps_with_few_pages(left, 1)

    @rule(page_id=st.integers(1, 23))
    def evict(self, page_id):
        if not self.pool.blocks[page_id].ref_cnt:
            self.pool.evict_blocks({page_id})

    @rule(preempts=st.booleans())
    def reset_prefix_cache(self, preempts):
        """vLLM refuses to preempt all for this with a connector, or with pages of others in use."""
        if preempts and not self.setup.connector and not self.taken:
            assert self.scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            used = any(page.ref_cnt for page in self.pool.blocks if not page.is_null)
            assert self.scheduler.reset_prefix_cache() == (not used)

    @is_busy
    @rule(mode=st.sampled_from(["abort", "wait", "keep"]))
    def pause_or_resume(self, mode):
        if self.scheduler.pause_state != PauseState.UNPAUSED:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)
            return
        if mode == "abort":
            self._abort(None)
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)

    @precondition(lambda self: self.runner.loads)
    @rule(data=st.data(), arrives=st.booleans())
    def end_load(self, data, arrives):
        self.ended_loads.append(self.runner.end_load(data.draw(st.sampled_from(list(self.runner.loads))), arrives))

    @connected
    @rule(data=st.data())
    def release(self, data):
        self._release([data.draw(st.sampled_from(["unknown", *sorted(self.held)])), "unknown"])

    def _release(self, names: list[str]) -> None:
        self.scheduler.connector.release(names)
        self.held -= set(names)

    @is_busy
    @rule()
    def drain(self):
        """All requests end within a bounded number of steps, and nothing is left of them."""
        self._drain()

    def _drain(self) -> None:
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        self.pool.free_blocks(self.taken)
        self.taken = []
        for case in self._uncompiled():
            case.compile(99, False)
        for _ in range(1000):
            if self.setup.connector:
                self._release(sorted(self.held))
            for name in list(self.runner.loads):
                self.ended_loads.append(self.runner.end_load(name, True))
            if not self.in_flight and not self.scheduler.has_requests():
                break
            self._step([])
        assert not self.live, f"requests are lost: {self.live}"
        check_empty(self.scheduler)

    # What must hold.

    @invariant()
    def all_pages_are_explained(self):
        held = [page.block_id for page in self.taken]
        if self.setup.connector:
            holds = self.scheduler.connector.connector_scheduler.holds
            assert holds.keys() == self.held, "pages are held for completed parts of prompts, until they are released"
            held += [page.block_id for hold in holds.values() for page in hold.pages]
        check_pages(self.scheduler, held)

    @invariant()
    def no_request_is_lost(self):
        check_queues(self.scheduler, self.live)

    @invariant()
    def no_page_of_the_prefix_cache_is_wrong(self):
        for name in self.live:
            self.keys.learn(self.cases[name])
        if all(returned is not None for _, returned in self.in_flight):
            self.keys.check(self.scheduler)

    def teardown(self):
        if sys.exc_info()[0] is None and hasattr(self, "scheduler"):
            self._drain()
