"""Prompts with documents, in vLLM's scheduler: pages, statistics and what clients see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.scheduler.cache_state import prefill_progress
from starling.scheduler.padding import BlockPadding, count_client_tokens, with_padding, without_padding
from starling.scheduler.planning.documents import lay_out
from starling.scheduler.planning.plan import StarPlan, blocks_done, client_index, client_indexes, pad
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata
from tests.unit.scheduler.simulation import PAGE_SIZE, Engine, answer, make_scheduler, random_ids
from tests.unit.scheduler.test_star_scheduler import config

__all__ = ["config"]

PAD, QUERY = 249, 20
HEAD = random_ids(0, 70)
A, B, C, D = (random_ids(seed, length) for seed, length in ((1, 100), (2, 33), (3, 64), (4, 5)))


@dataclass(frozen=True)
class Prompt:
    """A head, documents, and a question."""

    documents: list[list[int]]
    head: list[int]
    question: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.head, *(token for one in self.documents for token in one), *self.question]

    @property
    def plan(self) -> StarPlan:
        ends = np.cumsum([0, len(self.head), *map(len, self.documents)]).tolist()
        blocks, end = lay_out(list(pairwise(ends)), PAGE_SIZE)
        anchor = len(self.head) // PAGE_SIZE * PAGE_SIZE
        return StarPlan(256, anchor, 0, end, end + len(self.question), documents=blocks, padding_token=PAD)


def prompt(*documents: list[int], head: list[int] = HEAD, seed: int = 9) -> Prompt:
    return Prompt(list(documents), head, random_ids(seed, QUERY))


def pages(*documents: list[int]) -> int:
    """Tokens of the pages of these documents."""
    return sum(-(-len(one) // PAGE_SIZE) * PAGE_SIZE for one in documents)


@pytest.mark.parametrize(("scheduler_type", "ahead"), [(StarScheduler, 0), (AsyncStarScheduler, 1)])
@pytest.mark.parametrize("v2", [False, True])
def test_documents_are_computed_once_wherever_they_stand(config, scheduler_type, ahead, v2):
    """The engine holds each token that attention reads against what the definition says of it."""
    engine = Engine(make_scheduler(config, scheduler_type, num_pages=60, v2=v2), ahead=ahead)
    sequence = [
        ("cold", prompt(A, B, C), pages(HEAD, A, B, C)),
        ("in another order", prompt(C, A, B), 0),
        ("fewer", prompt(B), 0),
        ("one more in between", prompt(C, D, A), pages(D)),
        ("one twice", prompt(D, B, D), 0),
        ("one that has grown", prompt([*B, 7], A), 32),
        ("another end of the head", prompt(A, B, head=[*HEAD[:64], 7]), 32),
        ("another anchor", prompt(A, B, head=[7, *HEAD[1:]]), pages(HEAD, A, B)),
        ("no head", prompt(A, B, head=[]), pages(A, B)),
        ("no head, in another order", prompt(B, A, head=[]), 0),
        ("a second question", prompt(C, A, B, seed=10), 0),
    ]
    for name, one, computed in sequence:
        engine.add(name, one.plan, one.ids)
        engine.run()
        engine.check_pages()
        assert engine.computed[name] == computed + QUERY + 2, name
        assert engine.cached[name] == len(one.ids) - min(computed + QUERY, len(one.ids)), name
    assert not engine.scheduler.part(BlockPadding).plans
    assert engine.scheduler.reset_prefix_cache()
    engine.add("after a reset", prompt(A, B, C).plan, prompt(A, B, C).ids)
    engine.run()
    assert engine.computed["after a reset"] == pages(HEAD, A, B, C) + QUERY + 2


def test_prompts_of_all_kinds_at_once(config):
    """In few pages, so that requests are preempted; dense and star requests with the same tokens are beside them."""
    engine = Engine(make_scheduler(config, StarScheduler, num_pages=32))
    first, second = prompt(A, B, C), prompt(C, D, A, D)
    padded = pad(first.plan, first.ids)
    for number in range(3):
        engine.add(f"first{number}", first.plan, first.ids, max_tokens=40)
        engine.add(f"second{number}", second.plan, second.ids, max_tokens=40)
        engine.add(f"dense{number}", None, padded, max_tokens=40)
        engine.add(f"star{number}", StarPlan(64, 64, 0, 250, len(padded)), padded, max_tokens=40)
    preempted = 0
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        engine.check_pages()
        preempted = max([preempted, *(one.num_preemptions for one in engine.scheduler.requests.values())])
    assert preempted > 0
    assert not engine.scheduler.part(BlockPadding).plans


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_leaves_no_page_and_no_plan(config, steps):
    engine = Engine(make_scheduler(config, StarScheduler))
    engine.add("before", prompt(A).plan, prompt(A).ids)
    engine.run()
    engine.add("aborted", prompt(C, A, B).plan, prompt(C, A, B).ids, max_tokens=50)
    for _ in range(steps):
        engine.step()
    engine.scheduler.finish_requests(["aborted"], RequestStatus.FINISHED_ABORTED)
    engine.check_pages()
    assert engine.pool.get_num_free_blocks() == 39
    engine.add("after", prompt(B, A).plan, prompt(B, A).ids)
    engine.run()
    assert set(engine.scheduler.part(BlockPadding).plans) == set(), "forgotten with the next output"


def test_progress_counts_the_clients_tokens(config):
    """A step takes 100 tokens of the padded prompt."""
    engine = Engine(make_scheduler(config, StarScheduler))
    one = prompt(B, A, D)
    plan = one.plan
    engine.add("cold", plan, one.ids)
    padded = plan.num_prompt_tokens
    states = []
    while not states or states[-1]["computed"] < len(one.ids):
        states.append(prefill_progress(engine.scheduler, ["cold"])["cold"])
        engine.step()
    slots = [100 * step for step in range(len(states) - 1)] + [padded]
    assert [state["computed"] for state in states] == [client_index(plan, slot) for slot in slots]
    assert [state["star_blocks_done"] for state in states] == [blocks_done(plan, slot) for slot in slots]
    assert all(state["prompt"] == len(one.ids) and state["context"] == len(one.ids) - QUERY for state in states)
    assert states[-1]["star_blocks_done"] == states[-1]["star_blocks"] == 4
    engine.run()
    new = random_ids(5, 250)
    engine.add("warm", prompt(new, B, A).plan, prompt(new, B, A).ids)
    cached = []
    while "warm" not in engine.cached:
        cached += [state["cached"] for state in prefill_progress(engine.scheduler, ["warm"]).values()]
        engine.step()
    assert cached == [0, 70, 70, 64], "the head; less the 6 slots of padding once they are computed"
    assert engine.cached["warm"] == 64 + len([*B, *A])


def logprobs_of(count: int) -> LogprobsTensors:
    """Of a prompt of ``count`` tokens, all but the first; row i is of token i + 1."""
    rows = torch.arange(1, count)
    return LogprobsTensors(rows[:, None].int(), -rows[:, None].float(), rows.int())


def test_prompt_logprobs_are_those_of_the_clients_tokens(config):
    scheduler = make_scheduler(config, StarScheduler)
    engine = Engine(scheduler)
    one = prompt(B, D)
    plan, dense = one.plan, prompt(B, D).ids
    engine.add("padded", plan, one.ids, max_tokens=1, sampling={"prompt_logprobs": 0})
    engine.add("dense", None, dense, max_tokens=1, sampling={"prompt_logprobs": 0})
    found = {}
    for _ in range(9):
        output = scheduler.schedule()
        done = {
            name: scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens
            for name in output.num_scheduled_tokens
        }
        made = answer(output, {name: [7] if ended else [] for name, ended in done.items()})
        made.prompt_logprobs_dict = {
            name: logprobs_of(scheduler.requests[name].num_prompt_tokens) if ended else None
            for name, ended in done.items()
            if ended or name == "dense"
        }
        for outputs in scheduler.update_from_output(output, made).values():
            found |= {one.request_id: one.new_prompt_logprobs_tensors for one in outputs.outputs}
    assert found["padded"].logprob_token_ids[:, 0].tolist() == client_indexes(plan)[1:].tolist()
    assert len(found["padded"].logprobs) == len(one.ids) - 1
    assert found["dense"].logprob_token_ids[:, 0].tolist() == list(range(1, len(dense)))


@given(st.data())
def test_statistics_add_up_to_the_clients_prompt(data):
    lengths = data.draw(st.lists(st.integers(1, 80), min_size=2, max_size=5))
    one = Prompt([[1] * length for length in lengths[1:]], [1] * lengths[0], [1] * data.draw(st.integers(1, 40)))
    plan = one.plan
    cached = PAGE_SIZE * data.draw(st.integers(0, (plan.num_prompt_tokens - 1) // PAGE_SIZE))
    computed = plan.num_prompt_tokens - cached
    fetched = PAGE_SIZE * data.draw(st.integers(0, cached // PAGE_SIZE))
    stats = SimpleNamespace(
        num_prompt_tokens=plan.num_prompt_tokens, num_cached_tokens=cached, num_external_cached_tokens=fetched
    )
    count_client_tokens(plan, stats)
    assert stats.num_prompt_tokens == len(one.ids) == stats.num_cached_tokens + stats.num_computed_tokens
    assert stats.num_cached_tokens == max(len(one.ids) - computed, 0)
    assert stats.num_cached_tokens == stats.num_local_cached_tokens + stats.num_external_cached_tokens
    assert 0 <= stats.num_external_cached_tokens <= fetched and stats.num_local_cached_tokens >= 0
    assert 0 <= stats.num_cached_tokens <= cached, "padding is no cache hit"
    kept = without_padding(plan, logprobs_of(plan.num_prompt_tokens))
    assert kept.selected_token_ranks.tolist() == client_indexes(plan)[1:].tolist()


@pytest.mark.parametrize("form", [list, lambda ids: np.array(ids, dtype=np.int32)], ids=["list", "array"])
def test_the_engine_core_pads_a_copy(form):
    """Since vLLM 0.34 a front sends the prompt as an array."""
    one = prompt(B, D)

    def request(plan):
        params = SamplingParams(extra_args={KEY: RequestMetadata(plan).to_wire()})
        return EngineCoreRequest(
            request_id="one",
            prompt_token_ids=form(one.ids),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    sent = request(one.plan)
    padded = with_padding(sent)
    assert list(sent.prompt_token_ids) == one.ids
    assert padded.prompt_token_ids == pad(one.plan, one.ids) and padded.request_id == "one"
    for plan in (None, StarPlan(64, 64, 0, 100, len(one.ids))):
        sent = request(plan)
        assert with_padding(sent) is sent
