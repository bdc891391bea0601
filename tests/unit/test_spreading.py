"""A prompt over two replicas, on a fake engine: what each is asked to do, in which order, and what is let go."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from vllm.sampling_params import SamplingParams

from engine_ext import spreading
from engine_ext.kv_room import KVRoom, Rooms, enough_replicas, rooms
from engine_ext.metrics import front_metrics
from engine_ext.requests import PlannedPrompt
from scheduler.options import OptionError
from scheduler.plan import StarPlan
from scheduler.share import LOST, SHARE_KEY, Attend, Part, Pull
from scheduler.spread import Run

PAGE = 32
PLAN = StarPlan(64, 64, 0, 500, 520, 2)
"""8 blocks, the last of 52 tokens: one whole page and a part of one."""

TOKENS = list(range(520))
LAYOUT = {"dtype": "float32"}


def planned(plan: StarPlan | None):
    """What plans each prompt so."""
    return lambda extra_args, num_tokens, token_ids: PlannedPrompt(plan, num_tokens, token_ids)


def output(finish: str = "length", params: dict | None = None, index: int = 0) -> SimpleNamespace:
    choice = SimpleNamespace(index=index, token_ids=[1], finish_reason=finish)
    return SimpleNamespace(outputs=[choice], kv_transfer_params=params)


class FakeEngine:
    """Replicas that prefill what they are asked to, as the tests want it."""

    def __init__(self, states: list[dict] | None = None) -> None:
        idle = {"cached": [], "has_anchor": False, "queued_tokens": 0, "layout": LAYOUT, "pages": 100}
        self.states = [idle | state for state in states or [{}, {}]]
        self.ran: list[tuple[int, int, int]] = []  # (replica, first token, last token + 1)
        self.let_go: list[tuple[int, list[str]]] = []
        self.held: set[str] = set()
        self.cancelled = 0
        self.errored = False
        self.gate: asyncio.Event | None = None
        self.full: Exception | None = None
        self.answers = lambda rank, share: output(params=self.found(share))
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=len(self.states)))
        resolver = SimpleNamespace(page=PAGE, plan=planned(PLAN))
        self.input_processor = SimpleNamespace(starling=resolver, process_inputs=self.process)
        self.generated: list[tuple] = []
        self.prompts: list[dict] = []
        self.output_processor = SimpleNamespace(external_req_ids={}, request_states={})

    def check_admission(self, n: int, request_id: str) -> None:
        if self.full is not None:
            raise self.full

    async def get_supported_tasks(self):
        return ("generate",)

    def process(self, request_id, prompt, params, **keywords):
        return SimpleNamespace(request_id=request_id, prompt=prompt, params=params, **keywords)

    def found(self, share) -> dict:
        return {"name": share.task.name, "start": share.task.start, "pages": [9] * 2, "addresses": [{}]}

    async def call_replica(self, engine, rank, name, *args):
        if name == spreading.LET_GO:
            self.let_go.append((rank, args[0]))
            self.held -= set(args[0])
            return None
        self.looked = args
        return self.states[rank]

    async def run_unseen(self, engine, request):
        share = request.params.extra_args[SHARE_KEY]
        assert isinstance(share.task, Part) and request.params.max_tokens == 1
        rank, stop = request.data_parallel_rank, len(request.prompt["prompt_token_ids"])
        self.ran.append((rank, share.task.start, stop))
        self.last = request
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        self.held.add(share.task.name)
        return self.answers(rank, share)

    async def generate(self, prompt, params, request_id, **keywords):
        self.prompts.append(prompt)
        self.generated.append((params, request_id, keywords))
        for index in range(params.n):
            yield output(index=index)


@pytest.fixture
def engine(monkeypatch):
    made = FakeEngine()
    monkeypatch.setattr(spreading.compat, "call_replica", lambda *args: made.call_replica(*args))
    monkeypatch.setattr(spreading.compat, "run_unseen", lambda *args: made.run_unseen(*args))
    return made


PROMPT = {"type": "token", "prompt_token_ids": TOKENS, "cache_salt": "salt"}


async def run(engine, params=None, **keywords) -> list:
    outputs = spreading.spread(engine, engine.generate, PROMPT, params or SamplingParams(), "me", keywords)
    return [output async for output in outputs]


def test_parts_are_those_of_the_aligned_prompt_and_the_whole_is_planned_anew(engine):
    aligned = [*TOKENS[:60], *[60] * 4, *TOKENS[60:500], *TOKENS[504:]]
    engine.input_processor.starling.plan = lambda *_: PlannedPrompt(PLAN, 520, aligned, 4)
    asyncio.run(run(engine))
    assert engine.looked[0] == aligned
    assert engine.last.prompt["prompt_token_ids"] == aligned[: len(engine.last.prompt["prompt_token_ids"])]
    assert engine.prompts == [PROMPT]


def test_parts_go_to_both_and_the_request_to_the_first_ones_replica(engine):
    asyncio.run(run(engine, SamplingParams(extra_args={"theirs": 1}), priority=7))
    assert sorted(engine.ran) == [
        (0, 0, 320),
        (1, 0, 64),
        (1, 320, 480),
    ]  # 5 blocks | anchor, 3 blocks to the last page
    assert engine.ran.index((1, 0, 64)) < engine.ran.index((1, 320, 480))
    assert (engine.last.request_id, engine.last.priority, engine.last.prompt["cache_salt"]) == ("me", 7, "salt")
    assert engine.last.params.extra_args[SHARE_KEY].plan == PLAN.to_wire()
    assert engine.looked == (TOKENS, PLAN.to_wire(), "salt")
    ((params, request_id, keywords),) = engine.generated
    assert (request_id, keywords) == ("me", {"priority": 7, "data_parallel_rank": 0})
    pull = params.extra_args[SHARE_KEY].task
    assert isinstance(pull, Pull) and [source.start for source in pull.sources] == [320]
    assert params.extra_args["theirs"] == 1
    assert not engine.held


def test_an_anchor_that_is_cached_is_not_computed_again(engine):
    engine.states[1] |= {"has_anchor": True}
    asyncio.run(run(engine))
    assert sorted(engine.ran) == [(0, 0, 256), (1, 256, 480)]


def test_a_replica_that_has_it_all_gets_the_request_and_no_parts_are_made(engine):
    engine.states[1] |= {"cached": list(range(8)), "has_anchor": True}
    asyncio.run(run(engine))
    ((params, _, keywords),) = engine.generated
    assert engine.ran == [] and keywords == {"data_parallel_rank": 1}
    assert SHARE_KEY not in (params.extra_args or {})


def test_a_busy_replica_gets_less(engine):
    engine.states[0] |= {"queued_tokens": 64 * 100}
    asyncio.run(run(engine))
    assert engine.ran == [] and engine.generated[0][2] == {"data_parallel_rank": 1}


def test_pages_are_let_go_once_every_choice_has_a_token(engine, monkeypatch):
    """Also where nothing is told before the end, as in a response that is not streamed."""
    monkeypatch.setattr(spreading, "FETCH_CHECK_SECONDS", 0.001)
    states = [SimpleNamespace(is_prefilling=True), SimpleNamespace(is_prefilling=True)]
    names = {"me": ["0_me", "1_me"]}
    engine.output_processor = SimpleNamespace(
        external_req_ids=names, request_states=dict(zip(names["me"], states, strict=True))
    )
    held = []

    async def generate(prompt, params, request_id, **keywords):
        for state in states:
            await asyncio.sleep(0.02)
            held.append(len(engine.held))
            state.is_prefilling = False
        await asyncio.sleep(0.02)
        held.append(len(engine.held))
        yield output()

    engine.generate = generate
    asyncio.run(run(engine, SamplingParams(n=2, temperature=1)))
    assert held == [3, 3, 0]


def test_pages_of_others_that_differ_are_refused_with_both_sides(engine):
    engine.states[1] |= {"layout": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"replicas 0 and 1 can't share a prompt.*'float32' here, 'bfloat16' there"):
        asyncio.run(run(engine))
    assert engine.ran == engine.generated == []


def test_a_cancel_in_the_middle_ends_every_part_and_lets_go(engine):
    async def cancel():
        engine.gate = asyncio.Event()
        task = asyncio.create_task(run(engine))
        while len(engine.ran) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert engine.cancelled == 2 and engine.generated == []
    assert {rank for rank, _ in engine.let_go} == {0, 1}


def test_a_part_that_fails_ends_the_others_and_its_error_is_told(engine):
    def fail(rank, share):
        if rank == 1:
            raise RuntimeError("no")
        return output(params=engine.found(share))

    engine.answers = fail
    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(run(engine))
    assert not engine.held and engine.generated == []


def test_a_dead_engine_is_not_asked_to_let_go(engine):
    def die(rank, share):
        engine.errored = True
        raise RuntimeError("dead")

    engine.answers = die
    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(run(engine))
    assert engine.let_go == []


def test_an_abort_by_id_is_the_requests_end(engine):
    engine.answers = lambda rank, share: output("abort")
    (ended,) = asyncio.run(run(engine))
    assert ended.outputs[0].finish_reason == "abort" and engine.generated == []


def test_a_silent_replicas_part_is_computed_by_another(engine, monkeypatch):
    """Its part does not end and it answers nothing: the whole prompt goes to one that does, and so does the next."""
    monkeypatch.setattr(spreading, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("STARLING_SILENCE_SECONDS", "0.05")
    monkeypatch.setattr(spreading.compat, "DEATH_CHECK_SECONDS", 0.01)
    answering, running = engine.call_replica, engine.run_unseen
    cut = asyncio.Event()

    async def call_replica(engine, rank, name, *args):
        if rank == 0 and cut.is_set():
            await asyncio.Event().wait()
        return await answering(engine, rank, name, *args)

    async def run_unseen(engine, request):
        if request.data_parallel_rank == 0:
            cut.set()
            await asyncio.Event().wait()
        return await running(engine, request)

    engine.call_replica, engine.run_unseen = call_replica, run_unseen

    async def twice():
        return await run(engine), await run(engine)

    first, second = asyncio.run(asyncio.wait_for(twice(), 20))
    assert len(first) == len(second) == 1
    assert [keywords["data_parallel_rank"] for _, _, keywords in engine.generated] == [1, 1]
    assert all(SHARE_KEY not in (params.extra_args or {}) for params, _, _ in engine.generated)
    assert not engine.held


def test_an_answer_does_not_wait_for_a_replica_that_is_silent_at_its_end(engine, monkeypatch):
    """Its host is cut off after its part: it is told to let go once it hears again."""
    monkeypatch.setattr(spreading, "RELEASE_SECONDS", 0.01)
    monkeypatch.setattr(spreading.compat, "DEATH_CHECK_SECONDS", 0.01)
    answering = engine.call_replica

    async def ended_while_silent():
        mended = asyncio.Event()

        async def call_replica(engine, rank, name, *args):
            if rank == 1 and name == spreading.LET_GO:
                await mended.wait()
            return await answering(engine, rank, name, *args)

        engine.call_replica = call_replica
        outputs = await asyncio.wait_for(run(engine), 5)
        held = set(engine.held)
        mended.set()
        await asyncio.gather(*spreading.releases(engine))
        return outputs, held

    outputs, held = asyncio.run(ended_while_silent())
    assert len(outputs) == 1 and held and not engine.held


def test_a_full_server_refuses_before_anything_is_computed(engine):
    engine.full = RuntimeError("full")
    with pytest.raises(RuntimeError, match="full"):
        asyncio.run(run(engine))
    assert engine.ran == []


def test_blocks_are_counted_by_replica(engine):
    def count(replica):
        return front_metrics().spread_blocks.labels(replica)._value.get()

    before = count("0"), count("1")
    asyncio.run(run(engine))
    assert (count("0") - before[0], count("1") - before[1]) == (5, 3)


@pytest.mark.parametrize(
    ("prompt", "params", "keywords"),
    [
        ("text", SamplingParams(), {}),
        ({"type": "multimodal", "prompt_token_ids": TOKENS}, SamplingParams(), {}),
        (PROMPT, SamplingParams(prompt_logprobs=1), {}),
        (PROMPT, SamplingParams(skip_reading_prefix_cache=True), {}),
        (PROMPT, SamplingParams(), {"data_parallel_rank": 1}),
        (PROMPT, SimpleNamespace(), {}),
    ],
    ids=["raw text", "images", "prompt logprobs", "no cache", "a rank of its own", "pooling"],
)
def test_what_can_not_be_spread_is_vllms(engine, prompt, params, keywords):
    assert spreading.plan_to_spread(engine.input_processor, prompt, params, keywords) is None


@pytest.mark.parametrize("plan", [None, StarPlan(64, 64, 0, 500, 520)])
def test_dense_prompts_and_plans_for_one_replica_are_vllms(engine, plan):
    engine.input_processor.starling.plan = planned(plan)
    assert spreading.plan_to_spread(engine.input_processor, PROMPT, SamplingParams(), {}) is None


SHARDED = StarPlan(64, 64, 0, 500, 520, 2, True)


@pytest.fixture
def sharded(engine):
    """The same, for plans whose KV stays where it was made; what happens is noted in order."""
    engine.input_processor.starling.plan = planned(SHARDED)
    engine.happened = []
    answering = engine.call_replica

    async def call_replica(engine_, rank, name, *args):
        if name == spreading.OPEN_SHARD:
            assert args[0] in engine.held
            engine.happened.append(("open", rank))
            return [{"name": f"holder{rank}"}]
        if name == spreading.LET_GO:
            engine.happened.append(("let go", rank, len(args[0])))
        return await answering(engine_, rank, name, *args)

    async def generate(prompt, params, request_id, **keywords):
        engine.generated.append((params, request_id, keywords))
        try:
            for _ in range(2):
                engine.happened.append(("token", len(engine.held)))
                yield output()
        finally:
            engine.happened.append(("ended",))

    engine.call_replica, engine.generate = call_replica, generate
    return engine


def test_shards_are_opened_and_held_to_the_end_and_let_go_after_the_request_has_left(sharded):
    before = front_metrics().shard_requests._value.get()
    asyncio.run(run(sharded))
    assert sorted(sharded.ran) == [(0, 0, 320), (1, 0, 64), (1, 320, 480)]
    assert sharded.happened == [
        ("let go", 1, 1),  # its copy of the anchor
        ("open", 1),
        ("token", 2),
        ("token", 2),
        ("ended",),
        ("let go", 0, 0),  # answered between two steps
        ("let go", 0, 1),
        ("let go", 1, 2),
    ]
    assert not sharded.held
    ((params, _, keywords),) = sharded.generated
    attend = params.extra_args[SHARE_KEY].task
    assert isinstance(attend, Attend) and keywords == {"data_parallel_rank": 0}
    (shard,) = attend.shards
    assert (shard.start, shard.tokens, shard.addresses) == (320, 2 * PAGE, [{"name": "holder1"}])
    assert attend.own != shard.name
    assert front_metrics().shard_requests._value.get() == before + 1


def test_a_request_whose_holder_is_lost_ends_with_the_reason(sharded):
    async def generate(prompt, params, request_id, **keywords):
        yield output("error", {LOST: "no answer for 10 s"})

    sharded.generate = generate
    with pytest.raises(spreading.ShardLost, match=r"holds a part of the prompt's KV.*no answer for 10 s"):
        asyncio.run(run(sharded))
    assert not sharded.held and not rooms(sharded).taken.total()


def test_a_silent_replica_is_an_error_where_kv_is_to_stay(sharded, monkeypatch):
    def silent(rank, share):
        raise spreading.ReplicaSilent(1)

    sharded.answers = silent
    with pytest.raises(spreading.ReplicaSilent):
        asyncio.run(run(sharded))
    assert sharded.generated == [] and not rooms(sharded).taken.total()


def test_a_replica_that_does_not_let_go_keeps_no_client_waiting_and_is_told(sharded, monkeypatch):
    monkeypatch.setattr(spreading, "RELEASE_SECONDS", 0.01)
    answering = sharded.call_replica
    back = None

    async def call_replica(engine, rank, name, *args):
        if name == spreading.LET_GO and rank == 1 and sharded.generated:
            await back.wait()
        return await answering(engine, rank, name, *args)

    sharded.call_replica = call_replica

    async def hang():
        nonlocal back
        back = asyncio.Event()
        await run(sharded)
        assert len(sharded.held) == 1 and rooms(sharded).taken.total()
        spreading.silent_replicas(sharded)[1] = asyncio.get_running_loop().create_future()
        back.set()
        await asyncio.gather(*spreading.releases(sharded))

    asyncio.run(hang())
    assert not sharded.held and not rooms(sharded).taken.total()


def test_prompts_over_shards_take_their_memory_at_once_and_in_turn(sharded):
    """Each takes more than half of a replica: the second one begins once the first has let go."""
    for state in sharded.states:
        state["pages"] = 20

    async def both():
        return await asyncio.gather(run(sharded, SamplingParams(max_tokens=10)), run(sharded, SamplingParams(n=2)))

    asyncio.run(both())
    ends = [index for index, event in enumerate(sharded.happened) if event == ("ended",)]
    opens = [index for index, event in enumerate(sharded.happened) if event[0] == "open"]
    assert opens[0] < ends[0] < opens[1] < ends[1]
    assert not rooms(sharded).taken.total() and not sharded.held


def test_those_that_fetch_wait_for_those_with_shards_alone():
    async def order():
        made, pages = Rooms(), {0: 10}
        one, other = await made.take({0: 8}, pages, False), await made.take({0: 8}, pages, False)
        shards = asyncio.ensure_future(made.take({0: 8}, pages, True))
        fetches = asyncio.ensure_future(made.take({0: 8}, pages, False))
        for promise in (one, other):
            await asyncio.sleep(0)
            assert not shards.done() and not fetches.done()
            promise.give_back()
        held = await shards
        await asyncio.sleep(0.01)
        assert not fetches.done()
        held.give_back()
        held.give_back()
        last = await fetches
        assert made.taken[0] == 8 and not made.shards
        waiting = asyncio.ensure_future(made.take({0: 8}, pages, True))
        await asyncio.sleep(0)
        waiting.cancel()  # takes nothing
        await asyncio.sleep(0)
        last.give_back()
        assert made.taken[0] == 0 and not made.turn.locked()

    asyncio.run(order())


def test_what_a_prompt_takes_of_each_replica():
    room = KVRoom(SHARDED, PAGE, {0: 100, 1: 12})
    runs = [Run(0, 0, 5), Run(1, 5, 8)]
    assert room.of_runs(runs, SimpleNamespace(n=2, max_tokens=30)) == {0: 10 + 2 * (2 + 1), 1: 6 + 2}
    assert room.of_runs(runs, SimpleNamespace(n=1, max_tokens=None)) == {0: 100, 1: 8}
    assert (room.blocks(0), room.blocks(1)) == (49, 5)  # beside the anchor's 2 pages, or the query's
    fetching = KVRoom(PLAN, PAGE, {0: 100, 1: 12})
    assert fetching.of_runs(runs, SimpleNamespace(n=2, max_tokens=30)) == {0: 16 + 2, 1: 6 + 2}


def test_as_many_replicas_as_the_kv_needs():
    assert enough_replicas(SHARDED, PAGE, 100, 3).replicas == 2
    assert enough_replicas(SHARDED, PAGE, 8, 3).replicas == 3  # 3 blocks in each
    with pytest.raises(OptionError, match=r"star_shards='on' is refused: 8 star blocks .* than 2 replicas of 8 pages"):
        enough_replicas(SHARDED, PAGE, 8, 2)
    with pytest.raises(OptionError, match="than 3 replicas of 2 pages"):
        enough_replicas(SHARDED, PAGE, 2, 3)
