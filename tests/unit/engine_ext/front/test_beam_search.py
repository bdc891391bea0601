"""Beam search on a server whose default is star: vLLM makes a new prompt of each beam and token, and all run dense."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.inputs import tokens_input
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import BeamSearchParams

from starling.engine_ext.front.call import Call, current_call
from starling.scheduler.planning.request_metadata import metadata_of
from tests.unit.engine_ext.front.simulation import PAGE_SIZE, Server
from tests.unit.scheduler.simulation import random_ids

TOKENS = random_ids(0, 520)
STEPS, WIDTH = 4, 2
PARAMS = BeamSearchParams(beam_width=WIDTH, max_tokens=STEPS, ignore_eos=True)
LIKELIEST = [{token: Logprob(-token / 100) for token in range(1, 2 * WIDTH + 1)}]
RENDERER = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(eos_token_id=0, decode=lambda ids, **_: ""))


@pytest.fixture(params=["on", "auto"], autouse=True)
def default(request, server_config, monkeypatch):
    star = {"star": request.param, "star_block_size": 64, "star_min_tokens": 100}
    monkeypatch.setattr(server_config, "additional_config", {"starling": star})


class Client:
    """The engine client of an OpenAI server, over an engine that samples no log probabilities."""

    def __init__(self, server: Server) -> None:
        self.engine, self.input_processor = server.engine, server.engine.input_processor

    async def generate(self, prompt, params, request_id, **keywords):
        async for output in self.engine.generate(prompt, params, request_id, **keywords):
            output.outputs[0].logprobs = LIKELIEST
            yield output


async def search_online(server: Server) -> None:
    search = object.__new__(type("Serving", (BeamSearchOnlineMixin,), {}))
    search.renderer, search.engine_client = RENDERER, Client(server)
    async for _ in search.beam_search(tokens_input(TOKENS), "me", PARAMS):
        pass


def test_beams_over_http_run_dense_and_compute_nothing_again(simulate):
    async def scenario(server):
        noted = Call()
        token = current_call.set(noted)
        await search_online(server)
        current_call.reset(token)
        requests = [request for replica in server.replicas for request in replica.requests.values()]
        assert {metadata_of(request).plan for request in requests} == {None}
        assert len(requests) == 1 + WIDTH * (STEPS - 1)
        assert [plan["attention"] for plan in noted.plans] == ["dense"]
        for spans in server.work():  # the first prompt of a replica is computed, all others but for their last page
            assert all(stop - start <= PAGE_SIZE for start, stop in spans[1:])

    simulate(scenario)


def test_beams_of_an_offline_engine_run_dense(simulate):
    async def scenario(server):
        requests = []

        class Offline(BeamSearchOfflineMixin):
            renderer, llm_engine, model_config = RENDERER, server.engine, server.engine.model_config

            def _preprocess_cmpl(self, prompts):
                return prompts

            def _render_and_run_requests(self, prompts, params, *args, **keywords):
                outputs = []
                for prompt, own in zip(prompts, params, strict=True):
                    processor = server.engine.input_processor
                    requests.append(processor.process_inputs("me", prompt, own, supported_tasks=("generate",)))
                    choice = CompletionOutput(0, "", [1], None, LIKELIEST)
                    outputs.append(RequestOutput("me", None, [], None, [choice], finished=True))
                return outputs

        (found,) = object.__new__(Offline).beam_search([tokens_input(TOKENS)], PARAMS)
        assert len(found.sequences) == WIDTH
        assert len(requests) == 1 + WIDTH * (STEPS - 1)
        assert {metadata_of(request).plan for request in requests} == {None}

    simulate(scenario)
