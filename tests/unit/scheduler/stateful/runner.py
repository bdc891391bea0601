"""A model runner whose pages hold fingerprints of KV states, for any KV cache groups.

It knows what the scheduler's output says, and nothing else of the scheduler. It keeps requests as vLLM's model runner
does: V1 takes a request's position from each step, V2 keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from tests.model_runners import runner_output
from tests.unit.scheduler.simulation import visible_positions
from tests.unit.scheduler.stateful.cases import Case

MARKS = np.array([0, 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F], dtype=np.int64)
"""The layers of each KV cache group have states of their own."""


@dataclass
class Row:
    """A request of the batch: its pages in each group, its position, and how many tokens of it the runner knows."""

    pages: list[list[int]]
    position: int
    num_tokens: int


class Runner:
    """Runs the steps of one scheduler, in their order.

    Attributes:
        memory: (pages, page size) int64, the states on each page.
        loads: request -> the pages that it fetches, and that have not arrived.
    """

    def __init__(self, specs: list[Any], num_pages: int, page_size: int, v2: bool, cases: dict[str, Case]) -> None:
        self.specs, self.page_size, self.v2, self.cases = specs, page_size, v2, cases
        self.memory = np.zeros((num_pages, page_size), dtype=np.int64)
        self.rows: dict[str, Row] = {}
        self.loads: dict[str, list[tuple[int, int]]] = {}

    def run(self, output: Any) -> ModelRunnerOutput:
        """Write and read the states of a step; returns the sampled tokens."""
        self._take_in(output)
        spans = {}
        for name, count in output.num_scheduled_tokens.items():
            row = self.rows[name]
            start, row.position = row.position, row.position + count
            self._check_states(name, start)
            spans[name] = (start, row.position)
            assert count > 0 and row.position <= row.num_tokens, f"{name} computes tokens that are not known"
            for group, spec in enumerate(self.specs):
                positions = np.arange(start, row.position)
                if isinstance(spec, MambaSpec):
                    self._keep_state(name, group, row.position - 1)
                    continue
                pages, slots = self._slots(name, group, positions)
                assert pages.all(), f"{name} writes to the null page of group {group}"
                self.memory[pages, slots] = self.cases[name].states[positions] ^ MARKS[group]
        for name, (start, end) in spans.items():
            self._check_reads(name, start, end)
        names = list(spans)
        return runner_output(names, [self._sample(name) for name in names])

    def _take_in(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for name in output.preempted_req_ids or ():
            self.cases[name].preempted = True
        for new in output.scheduled_new_reqs:
            self._skip_to(new.req_id, new.num_computed_tokens)
            known = new.prefill_token_ids if self.v2 else new.prompt_token_ids
            self.rows[new.req_id] = Row([list(ids) for ids in new.block_ids], new.num_computed_tokens, len(known))
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            row, new_ids = self.rows[name], cached.new_block_ids[index]
            self._skip_to(name, cached.num_computed_tokens[index])
            position, num_outputs = cached.num_computed_tokens[index], cached.num_output_tokens[index]
            num_tokens = self.cases[name].num_prompt_tokens + num_outputs
            if name in getattr(cached, "resumed_req_ids", ()):
                assert not self.v2, "V2 resumes requests as new ones"
                row = self.rows[name] = Row([[] for _ in self.specs], position, num_tokens)
            assert row.num_tokens == num_tokens, f"{name} has {row.num_tokens} tokens, and not {num_tokens}"
            for pages, fresh in zip(row.pages, new_ids or [()] * len(self.specs), strict=True):
                pages += fresh
            assert not self.v2 or row.position == position, "V2 keeps a request's position on the device"
            row.position = position
        if output.kv_connector_metadata is not None:
            for load in output.kv_connector_metadata.loads:
                assert not self.cases[load.request_id].preempted, "pages are fetched that are released by now"
                pairs = [zip(read.remote_page_ids, read.local_page_ids, strict=True) for read in load.reads]
                self.loads[load.request_id] = [pair for read in pairs for pair in read]

    def _skip_to(self, name: str, position: int) -> None:
        """Count the tokens that are hits of a request's first attempt."""
        if not self.cases[name].preempted:
            self.cases[name].skipped += position - (self.rows[name].position if name in self.rows else 0)

    def _slots(self, name: str, group: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pages = np.array(self.rows[name].pages[group], dtype=np.int64)
        return pages[positions // self.page_size], positions % self.page_size

    def _keep_state(self, name: str, group: int, position: int) -> None:
        """A chunk of a Mamba layer leaves the state behind its last token in the page of that token."""
        pages, _ = self._slots(name, group, np.array([position]))
        assert pages.all(), f"{name} writes to the null page of group {group}"
        self.memory[pages] = self.cases[name].states[position] ^ MARKS[group]

    def _check_states(self, name: str, start: int) -> None:
        """A chunk of a Mamba layer goes on from the state behind the token before it."""
        for group, spec in enumerate(self.specs):
            if isinstance(spec, MambaSpec) and start:
                page = self._slots(name, group, np.array([start - 1]))[0]
                right = self.memory[page, 0] == self.cases[name].states[start - 1] ^ MARKS[group]
                assert right, f"{name} goes on from a wrong state of group {group} at position {start}"

    def _check_reads(self, name: str, start: int, end: int) -> None:
        case = self.cases[name]
        for group, spec in enumerate(self.specs):
            if isinstance(spec, MambaSpec):
                continue
            if isinstance(spec, SlidingWindowSpec):
                keys = np.arange(max(0, start - spec.sliding_window + 1), end)
            elif isinstance(spec, ChunkedLocalAttentionSpec):
                keys = np.arange(start // spec.attention_chunk_size * spec.attention_chunk_size, end)
            else:
                keys = visible_positions(case.plan, start, end)
            wrong = keys[self.memory[self._slots(name, group, keys)] != case.states[keys] ^ MARKS[group]]
            where = f"at {wrong[:5]} of group {group} in its step from {start} to {end}"
            assert not len(wrong), f"{name} reads wrong KV {where}"

    def _sample(self, name: str) -> list[int]:
        row = self.rows[name]
        if row.position < row.num_tokens:
            return []
        row.num_tokens += 1
        return [self.cases[name].token_at(row.position)]

    def end_load(self, name: str, arrives: bool) -> KVConnectorOutput:
        """The fetch of a request ends: its pages have arrived, or its first pages are lost.

        A page of another replica has as its number the number that it has in the prompt.
        """
        pairs = self.loads.pop(name)
        for number, local in pairs if arrives else pairs[len(pairs) // 2 :]:
            positions = np.arange(number * self.page_size, (number + 1) * self.page_size)
            self.memory[local] = self.cases[name].states[positions] ^ MARKS[0]
        lost = set() if arrives else {local for _, local in pairs[: len(pairs) // 2]}
        return KVConnectorOutput(finished_recving={name}, invalid_block_ids=lost)
