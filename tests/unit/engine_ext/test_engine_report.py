"""What an engine finds when it starts, from its worker and scheduler to the fronts that plan its requests.

The configuration, the scheduler, and the message that an engine core sends its fronts are vLLM's own.
"""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from starling.config.parsing import OptionError
from starling.engine_ext import engine_core
from starling.engine_ext.front.requests import RequestPlanner
from starling.scheduler.planning.facts import PromptFacts
from starling.scheduler.planning.request_metadata import KEY
from tests.unit.engine_ext.front.simulation import HASH
from tests.unit.engine_ext.front.test_requests import processed
from tests.unit.engine_ext.start.test_activation import engine_config, model  # noqa: F401
from tests.unit.scheduler.simulation import PAGE_SIZE, SHAPE, make_scheduler

PROBLEM = "all layers run on an attention backend that is not wrapped, with the metadata builders TheirBuilder"
ONE_GROUP = [FullAttentionSpec(block_size=PAGE_SIZE, **SHAPE)]
TWO_GROUPS = [*ONE_GROUP, FullAttentionSpec(block_size=PAGE_SIZE, **SHAPE | {"num_kv_heads": 2})]
WINDOW = [SlidingWindowSpec(block_size=PAGE_SIZE, sliding_window=64, **SHAPE)]


def start(config, specs, problems=(None,)):
    """Start the engine core, with a worker for each of ``problems``; returns what it sends to each of its fronts."""
    init_none_hash(HASH)
    config.cache_config.num_gpu_blocks = 200
    workers = [
        SimpleNamespace(star_report=lambda problem=problem: {"star": problem, "toy": "toys"}) for problem in problems
    ]
    core = object.__new__(EngineCoreProc)
    core.vllm_config, core.engine_index, core.frontend_stats_publish_address = config, 0, None
    core.addresses, core.prefix_hash_config = EngineZmqAddresses([], []), None
    core.model_executor = SimpleNamespace(collective_rpc=lambda function: [function(worker) for worker in workers])
    core.scheduler = make_scheduler(config, config.scheduler_config.get_scheduler_cls(), num_pages=200, specs=specs)
    core._initialize_effective_attention_block_size()
    return msgspec.msgpack.encode(core._make_ready_response())


def planner_of(config, *ready_responses) -> RequestPlanner:
    """The planner of a front whose engine cores are ready."""
    client = object.__new__(MPClient)
    client.vllm_config = config
    client._effective_attention_block_sizes, client._kv_event_sources = set(), {}
    for response in ready_responses:
        client._apply_ready_response(response)
    return RequestPlanner(config)


@pytest.fixture
def start_server(model):  # noqa: F811
    """A server's planner: Starling's options, the KV cache's groups, what its workers found, and vLLM's arguments."""

    def made(star, specs, problems=(None,), **arguments):
        def config():
            return engine_config(model, block_size=PAGE_SIZE, additional_config={"starling": star}, **arguments)

        number = arguments.get("data_parallel_size", 1)
        return planner_of(config(), *(start(config(), specs, problems) for _ in range(number)))

    return made


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of engine cores. vLLM configures logging anew with each engine, so caplog does not see them."""
    found = []
    monkeypatch.setattr(engine_core.logger, "warning", lambda message, *args: found.append(message % args))
    return found


def plan_of(planner, options, length=3000):
    return planner.plan(options, PromptFacts(length, [1] * length)).plan


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize(
    ("specs", "problems", "reason"),
    [
        (ONE_GROUP, [PROBLEM], PROBLEM),
        (ONE_GROUP, [None, PROBLEM], PROBLEM),
        (WINDOW, [None], "the full-attention layers have no one KV page size"),
    ],
    ids=["no layer is wrapped", "a pipeline stage without full attention", "a KV cache of windows"],
)
def test_an_engine_that_can_not_run_star_starts_says_so_once_and_refuses_it(
    start_server, mode, specs, problems, reason, warnings
):
    planner = start_server({"star": mode, "star_min_tokens": 256}, specs, problems)
    assert sum(reason in warning for warning in warnings) == 1
    dense = processed(None, length=3000)
    planner.resolve(dense, None)
    assert "plan" not in dense.sampling_params.extra_args[KEY]
    asks = [("on", {"star": "on"}), ("auto", {"star": "auto"})]
    if mode != "off":
        asks.append((mode, {"star_block_size": 256}))
    for value, options in asks:
        with pytest.raises(VLLMValidationError) as refused:
            planner.resolve(processed(options), None)
        assert f"star='{value}' is refused: the engine can't run it" in str(refused.value)
        assert reason in str(refused.value) and "Allowed: off." in str(refused.value)


def test_an_engine_without_one_page_size_does_not_start_with_star_on(start_server):
    with pytest.raises(OptionError, match=r"star='on' is refused: the full-attention layers have no one KV page size"):
        start_server({"star": "on"}, WINDOW)


def test_an_engine_whose_layers_are_wrapped_runs_star(start_server):
    planner = start_server({"star": "on", "star_block_size": 256}, ONE_GROUP)
    assert planner.facts.refusals == ()
    assert plan_of(planner, None).block_size == 256


SPLIT = {"star": "on", "star_block_size": 256, "star_replicas": 2, "star_shards": "on"}


@pytest.mark.parametrize(
    ("specs", "star", "replicas", "logged"),
    [(ONE_GROUP, SPLIT, 2, 0), (TWO_GROUPS, SPLIT, 1, 2), (TWO_GROUPS, SPLIT | {"star_replicas": "auto"}, 1, 2)],
    ids=["one group", "two groups", "two groups, as many replicas as there are"],
)
def test_a_prompt_is_split_only_where_the_kv_caches_of_the_engines_have_one_group(
    start_server, specs, star, replicas, logged, warnings
):
    """The tiny Llama's configuration says one group; the engine's KV cache decides."""
    planner = start_server(star, specs, data_parallel_size=2, dtype="float32")
    plan = plan_of(planner, None)
    assert (plan.block_size, plan.replicas, plan.shards) == (256, replicas, replicas > 1)
    assert sum("stays on one replica" in warning for warning in warnings) == logged
    if replicas > 1:
        return
    for asked, allowed in (({"star_replicas": 2}, "auto or 1"), ({"star_shards": "on"}, "off")):
        with pytest.raises(VLLMValidationError, match=rf"is refused: .*\(2 groups\)\. Allowed: {allowed}\."):
            plan_of(planner, asked)


def test_an_engine_core_of_vllms_own_reports_nothing(model):  # noqa: F811
    config = engine_config(model, additional_config={"starling": {}}, block_size=PAGE_SIZE)
    assert engine_core.StarScheduler, "the module's import prepares the engine core"
    response = msgspec.msgpack.decode(start(config, ONE_GROUP))
    assert response.pop("starling") == {
        "star": None,
        "split": None,
        "block_positions": None,
        "toy": "toys",
    }, "a field that only one feature knows is in it"
    planner = planner_of(engine_config(model, additional_config={"starling": {}}), msgspec.msgpack.encode(response))
    assert planner.facts.refusals == ()


def test_an_engine_without_starling_in_the_same_process_reports_nothing(model, warnings):  # noqa: F811
    assert engine_core.StarScheduler, "the module's import prepares the engine core"
    config = engine_config(model, block_size=PAGE_SIZE)
    assert "starling" not in msgspec.msgpack.decode(start(config, WINDOW))
    assert warnings == []
