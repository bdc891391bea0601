"""Parameters that vLLM accepts and then fails with."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace

import pytest
from vllm.engine import arg_utils
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from starling.engine_ext.front.bounds import NO_GRAMMAR, NO_TOKEN, TRANSFER_KEYS
from starling.engine_ext.start import plugin
from tests.unit.engine_ext.configs import fake_config
from tests.unit.engine_ext.front.test_requests import ON, planner
from tests.unit.engine_ext.serving.grpc.fakes import output, result

CHOICE = {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])}
ALLOWED = {"allowed_token_ids": [1]}
JSON = {"structured_outputs": StructuredOutputsParams(json={"$ref": "#"})}
GRAMMAR = {"structured_outputs": StructuredOutputsParams(grammar="root ::= root root")}


@pytest.mark.parametrize("key", TRANSFER_KEYS)
@pytest.mark.parametrize("value", ["x", 7, ["x"], 0.5, True, ""], ids=repr)
@pytest.mark.parametrize("config", [ON, {}], ids=["activated", "not activated"])
def test_transfer_parameters_that_are_no_object_are_the_clients_error(config, key, value):
    params = SamplingParams(extra_args={key: value})
    with pytest.raises(VLLMValidationError) as refused:
        planner(config).prepare({"type": "token", "prompt_token_ids": [1, 2]}, params, "id")
    assert create_error_response(refused.value).error.code == 400
    assert refused.value.parameter == key


@pytest.mark.parametrize("value", [None, {}, {"do_remote_decode": False}], ids=repr)
def test_other_transfer_parameters_are_vllms(value):
    params = SamplingParams(extra_args={"kv_transfer_params": value})
    planner(ON).prepare({"type": "token", "prompt_token_ids": [1, 2]}, params, "id")
    assert params.extra_args == {"kv_transfer_params": value}


class Engine:
    """As far as a front looks at an AsyncLLM, and at its input processor, for which Starling is not activated."""

    def __init__(self) -> None:
        self.vllm_config = fake_config()
        self.vllm_config.additional_config = {}
        self.vllm_config.observability_config = SimpleNamespace(otlp_traces_endpoint=None)
        self.input_processor = self


@pytest.fixture
def generate_for_client(monkeypatch):
    """What the plugin puts around the engine's outputs."""
    hooks = {}
    monkeypatch.setattr(plugin, "on_engine_config", lambda before, after: hooks.update(after=after))
    monkeypatch.setattr(plugin, "on_generate", lambda prepare, around: hooks.update(around=around))
    for name in vars(plugin):
        if name.startswith("on_") and name not in ("on_engine_config", "on_generate"):
            monkeypatch.setattr(plugin, name, lambda *_: None)
    plugin._hook_in()
    hooks["after"](object.__new__(arg_utils.AsyncEngineArgs), SimpleNamespace(additional_config={}))
    return hooks["around"]


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        (CHOICE | ALLOWED, NO_TOKEN),
        (CHOICE, f"structured_outputs.choice is refused: {NO_GRAMMAR}."),
        (JSON, f"structured_outputs.json is refused: {NO_GRAMMAR}."),
        (GRAMMAR, f"structured_outputs.grammar is refused: {NO_GRAMMAR}."),
        (ALLOWED, None),
        ({}, None),
    ],
    ids=["both", "choice", "schema", "grammar", "allowed tokens", "none"],
)
def test_an_output_for_which_the_constraint_leaves_no_token(generate_for_client, fields, refused):
    """The engine ends it with an error, for which vLLM's server answers 500. So it does where it made no grammar."""
    closed = []

    async def generate(prompt, params, request_id):
        try:
            yield result(output("a"))
            yield result(output("", finish_reason="error"))
        finally:
            closed.append(request_id)

    async def scenario():
        outputs = generate_for_client(Engine(), generate, "prompt", SamplingParams(**fields), "id", {})
        return [one.outputs[0].finish_reason async for one in outputs]

    if refused:
        with pytest.raises(VLLMValidationError, match=re.escape(refused)) as error:
            asyncio.run(scenario())
        answer = create_error_response(error.value).error
        assert (answer.code, bool(answer.param)) == (400, True)
    else:
        assert asyncio.run(scenario()) == [None, "error"]
    assert closed == ["id"]
