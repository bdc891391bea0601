"""Each prompt is planned once, on every way that vLLM's fronts take to the engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams
from vllm.sampling_params import SamplingParams

from starling.engine_ext.front.requests import RequestPlanner
from starling.engine_ext.serving.grpc.inference import Inference
from starling.scheduler.planning.request_metadata import metadata_of
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.front.simulation import Server
from tests.unit.scheduler.simulation import random_ids

STAR = {"star": "on", "star_block_size": 64, "star_query_tokens": 20, "star_replicas": 1}
SPLIT = STAR | {"star_replicas": 2}
TOKENS = random_ids(0, 520)


@pytest.fixture
def plans(monkeypatch) -> list:
    """The arguments of every plan that is made."""
    made = []
    plan = RequestPlanner.plan

    def counted(self, *args):
        made.append(args)
        return plan(self, *args)

    monkeypatch.setattr(RequestPlanner, "plan", counted)
    return made


def plan_of(server: Server, replica: int = 0):
    """The plan that the only whole request has in a replica."""
    requests = [metadata_of(request) for request in server.replicas[replica].requests.values()]
    (whole,) = [metadata for metadata in requests if metadata.part is None]
    return whole.plan


@pytest.mark.parametrize(("star", "replicas"), [(STAR, 1), (SPLIT, 2), (SPLIT | {"star_shards": "on"}, 2)])
def test_a_request_of_an_async_engine(simulate, plans, star, replicas):
    async def scenario(server):
        await server.generate(TOKENS, star)
        assert len(plans) == 1
        assert plan_of(server).replicas == replicas

    simulate(scenario)


def test_a_dense_request(simulate, plans):
    async def scenario(server):
        await server.generate(TOKENS, {"star": "off"})
        assert len(plans) == 1
        assert plan_of(server) is None

    simulate(scenario)


def test_choices_of_one_request(simulate, plans):
    async def scenario(server):
        await server.generate(TOKENS, SPLIT, n=3, temperature=1.0)
        assert len(plans) == 1

    simulate(scenario)


def test_the_responses_api_which_prepares_a_prompt_twice(simulate, plans):
    """Before its own generator is made, and again where it calls the engine."""

    async def scenario(server):
        serving = object.__new__(OpenAIServingResponses)
        serving.engine_client, serving.model_config = server.engine, server.engine.model_config
        serving._log_inputs = lambda *args, **keywords: None
        outputs = []
        context = SimpleNamespace(append_output=outputs.append, need_builtin_tool_call=lambda: False)
        stream = serving._generate_with_builtin_tools(
            request_id="me",
            engine_input={"type": "token", "prompt_token_ids": TOKENS},
            sampling_params=SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False, extra_args=SPLIT),
            context=context,
        )
        assert len(plans) == 1, "before the response starts"
        async for _ in stream:
            pass
        assert outputs[-1].finished
        assert len(plans) == 1
        assert plan_of(server).replicas == 2

    simulate(scenario)


def test_grpc_which_hands_over_a_planned_prompt(simulate, plans):
    async def scenario(server):
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=TOKENS),
            star=pb.StarOptions(mode=pb.StarOptions.MODE_ON, block_size="64", query_tokens=20, replicas=2),
            sampling=pb.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True),
        )
        service = Inference(server.engine, on_dead=None, chat=ChatParams(), client_of=lambda context: "client")
        engine_input, params, shown = await service._prepare(request)
        assert (len(plans), shown["replicas"]) == (1, 2)
        async for _ in server.engine.generate(engine_input, params, "me"):
            pass
        assert len(plans) == 1
        assert plan_of(server).replicas == 2

    simulate(scenario)


def test_an_offline_engine_which_only_processes_inputs(simulate, plans):
    """`LLM.generate` has no generator to hook: the prompt is planned where it is processed."""

    async def scenario(server):
        params = SamplingParams(max_tokens=3, extra_args=STAR)
        processor = server.engine.input_processor
        for name in ("a", "b"):
            prompt = {"type": "token", "prompt_token_ids": TOKENS}
            request = processor.process_inputs(name, prompt, params, supported_tasks=("generate",))
            assert metadata_of(request).plan.block_size == 64
        assert len(plans) == 2
        assert params.extra_args == STAR

    simulate(scenario)


def test_a_refused_request_is_planned_once_too(simulate, plans):
    async def scenario(server):
        with pytest.raises(VLLMValidationError, match="star_block_size=65"):
            await server.generate(TOKENS, STAR | {"star_block_size": 65})
        assert len(plans) == 1

    simulate(scenario)
