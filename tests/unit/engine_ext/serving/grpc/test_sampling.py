"""Sampling parameters from starling.v1 to vLLM."""

import json

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from starling.engine_ext.serving.grpc import sampling
from starling.v1 import inference_pb2 as pb


def form(**constraint) -> pb.SamplingParams:
    return pb.SamplingParams(structured_outputs=pb.StructuredOutputs(**constraint))


@pytest.mark.parametrize(
    ("message", "defaults", "field", "value"),
    [
        (pb.SamplingParams(), {}, "temperature", 1.0),
        (pb.SamplingParams(), {"temperature": 0.6}, "temperature", 0.6),
        (pb.SamplingParams(temperature=0), {"temperature": 0.6}, "temperature", 0.0),
        (pb.SamplingParams(temperature=0.7), {}, "temperature", 0.7),
        (pb.SamplingParams(seed=-1), {}, "seed", None),
        (pb.SamplingParams(seed=2**63 - 1), {}, "seed", 2**63 - 1),
        (pb.SamplingParams(stop=["a", "b"]), {}, "stop", ["a", "b"]),
        (pb.SamplingParams(ignore_eos=True), {}, "ignore_eos", True),
        (pb.SamplingParams(max_tokens=99), {"max_tokens": 3}, "max_tokens", 7),
        (pb.SamplingParams(stop_token_ids=[5]), {"stop_token_ids": [6, 5]}, "stop_token_ids", [5, 6]),
        (pb.SamplingParams(min_tokens=2), {}, "min_tokens", 2),
        (pb.SamplingParams(frequency_penalty=-1), {}, "frequency_penalty", -1.0),
        (pb.SamplingParams(n=3), {}, "n", 3),
        (pb.SamplingParams(), {}, "logprobs", None),
        (pb.SamplingParams(logprobs=0), {}, "logprobs", 0),
        (pb.SamplingParams(logprobs=-1), {}, "logprobs", -1),
        (pb.SamplingParams(prompt_logprobs=2), {}, "prompt_logprobs", 2),
        (pb.SamplingParams(logit_bias={0: -100, 7: 0.5}), {}, "logit_bias", {0: -100.0, 7: 0.5}),
        (pb.SamplingParams(bad_words=["a b"]), {}, "bad_words", ["a b"]),
        (pb.SamplingParams(include_stop_str_in_output=True), {}, "include_stop_str_in_output", True),
        (pb.SamplingParams(skip_special_tokens=False), {}, "skip_special_tokens", False),
        (pb.SamplingParams(), {}, "structured_outputs", None),
        (pb.SamplingParams(), {}, "output_kind", RequestOutputKind.DELTA),
        (pb.SamplingParams(), {}, "extra_args", {"star": "on"}),
    ],
)
def test_sampling_params(message, defaults, field, value):
    params = sampling.sampling_params(message, defaults, max_tokens=7, star={"star": "on"})
    assert getattr(params, field) == value


@pytest.mark.parametrize(
    "message",
    [pb.SamplingParams(temperature=-1), pb.SamplingParams(top_p=0), pb.SamplingParams(min_tokens=8)],
    ids=["temperature", "top_p", "min above max"],
)
def test_bad_sampling_params_are_the_clients_error(message):
    with pytest.raises(VLLMValidationError):
        sampling.sampling_params(message, {}, max_tokens=7, star={})


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (form(json_schema='{"type": "object"}'), "json", '{"type": "object"}'),
        (form(regex="[a-z]+"), "regex", "[a-z]+"),
        (form(choices=pb.Choices(choices=["yes", "no"])), "choice", ["yes", "no"]),
    ],
    ids=["schema", "regex", "choices"],
)
def test_structured_outputs(message, field, value):
    constraint = sampling.sampling_params(message, {}, 7, {}).structured_outputs
    given = {name: getattr(constraint, name) for name in ("json", "regex", "choice", "grammar")}
    assert {name: value for name, value in given.items() if value is not None} == {field: value}


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (pb.SamplingParams(), None),
        (form(), None),
        (form(regex="a"), "sampling.structured_outputs.regex"),
        (form(choices=pb.Choices()), "sampling.structured_outputs.choices"),
    ],
    ids=["none", "empty", "regex", "choices"],
)
def test_constraint_path(message, path):
    assert sampling.constraint_path(message) == path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{}", {}),
        ('{"key": {"a": [1, null, "x"]}}', {"key": {"a": [1, None, "x"]}}),
        (f'{{"big": {2**64 - 1}, "small": {-(2**63)}}}', {"big": 2**64 - 1, "small": -(2**63)}),
        ('{"starling": 1}', {"starling": 1}),
    ],
    ids=["empty", "nested", "64-bit", "no star key"],
)
def test_extra_args_arrive_as_they_are(text, values):
    params = sampling.sampling_params(pb.SamplingParams(extra_args=text), {}, 7, {"star": "on"})
    assert params.extra_args == values | {"star": "on"}


REFUSED = {
    "star": (pb.SamplingParams(extra_args='{"star": "on"}'), "extra_args", "field `star`"),
    "star option": (pb.SamplingParams(extra_args='{"star_block_size": 64}'), "extra_args", "field `star`"),
    "the plan itself": (pb.SamplingParams(extra_args='{"star_plan": {}}'), "extra_args", "field `star`"),
    "transfer": (pb.SamplingParams(extra_args='{"kv_transfer_params": 7}'), "extra_args", "disaggregated serving"),
    "no JSON": (pb.SamplingParams(extra_args="{"), "extra_args", "it is not JSON"),
    "empty": (pb.SamplingParams(extra_args=""), "extra_args", "it is not JSON"),
    "NaN": (pb.SamplingParams(extra_args='{"a": NaN}'), "extra_args", "JSON has no NaN"),
    "a list": (pb.SamplingParams(extra_args="[1]"), "extra_args", "not a JSON object"),
    "a surrogate": (pb.SamplingParams(extra_args=r'{"a": "\ud800"}'), "extra_args", "it is not JSON"),
    "a preset": (pb.SamplingParams(extra_args='{"preset": "rag"}'), "extra_args", "option of the server, --preset"),
    "65 bits": (pb.SamplingParams(extra_args=f'{{"a": {2**64}}}'), "extra_args", "between -2**63"),
    "deep": (pb.SamplingParams(extra_args='{"a": ' + "[" * 64 + "]" * 64 + "}"), "extra_args", "64 levels"),
    "very deep": (pb.SamplingParams(extra_args="[" * 100_000), "extra_args", "it is not JSON"),
    "bias": (pb.SamplingParams(logit_bias={3: 101}), "logit_bias", "of token 3"),
    "bias NaN": (pb.SamplingParams(logit_bias={3: float("nan")}), "logit_bias", "of token 3"),
    "last seed": (pb.SamplingParams(seed=2**63 - 2, n=3), "seed", "seed + i"),
    "no constraint": (form(), "structured_outputs", "set json_schema"),
    "no choices": (form(choices=pb.Choices()), "structured_outputs", "choices needs texts"),
    "empty choice": (form(choices=pb.Choices(choices=["a", ""])), "structured_outputs", "no text may be empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    message, parameter, says = REFUSED[case]
    with pytest.raises(VLLMValidationError) as refused:
        sampling.sampling_params(message, {}, 7, {})
    assert refused.value.parameter == parameter
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "message",
    [pb.SamplingParams(n=0), pb.SamplingParams(n=2, temperature=0), pb.SamplingParams(bad_words=[""])],
    ids=["n=0", "n greedy", "bad word"],
)
def test_refused_by_vllm(message):
    with pytest.raises(VLLMValidationError):
        sampling.sampling_params(message, {}, 7, {})


@pytest.mark.parametrize("levels", [sampling.MAX_NESTING, sampling.MAX_NESTING + 1])
def test_nesting(levels):
    assert sampling.is_deep(json.loads("[" * levels + "]" * levels)) == (levels > sampling.MAX_NESTING)


def test_every_field_is_one_of_vllms():
    assert set(pb.SamplingParams.DESCRIPTOR.fields_by_name) <= set(SamplingParams.__struct_fields__)
