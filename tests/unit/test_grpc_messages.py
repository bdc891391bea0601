"""Conversions between starling.v1 and vLLM."""

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FINISH_REASON_STRINGS

from engine_ext.requests import describe
from engine_ext.serving import grpc_messages as messages
from scheduler.options import StarOptions, parse_options
from scheduler.plan import make_plan
from starling.v1 import inference_pb2 as pb


def output(**fields) -> CompletionOutput:
    values = {"index": 0, "text": "", "token_ids": [], "cumulative_logprob": None, "logprobs": None}
    return CompletionOutput(**values | fields)


def test_the_message_has_the_options_of_the_model():
    assert set(pb.StarOptions.DESCRIPTOR.fields_by_name) == set(StarOptions.model_fields)


def test_every_mode_has_a_number():
    named = set(pb.StarOptions.Mode.values()) - {pb.StarOptions.MODE_UNSPECIFIED}
    assert set(messages.MODES) == named
    for mode in messages.MODES.values():
        assert parse_options({"mode": mode}, flat=False).mode == mode


@pytest.mark.parametrize(
    ("message", "args"),
    [
        (pb.StarOptions(), {}),
        (pb.StarOptions(mode="MODE_UNSPECIFIED"), {}),
        (pb.StarOptions(mode="MODE_OFF"), {"star": "off"}),
        (pb.StarOptions(mode="MODE_AUTO", min_tokens=0), {"star": "auto", "star_min_tokens": 0}),
        (pb.StarOptions(query_tokens=0), {"star_query_tokens": 0}),
        (pb.StarOptions(block_size=2**53 + 1), {"star_block_size": 2**53 + 1}),
        (pb.StarOptions(mode=9), {"star": 9}),
    ],
    ids=["empty", "unspecified", "off", "zero is set", "zero query", "64-bit", "unnamed mode"],
)
def test_star_args(message, args):
    assert messages.star_args(message) == args


def test_star_args_over_the_wire():
    every = {field: index for index, field in enumerate(StarOptions.model_fields) if field != "mode"}
    sent = pb.StarOptions(mode="MODE_ON", **every)
    received = messages.star_args(pb.StarOptions.FromString(sent.SerializeToString()))
    assert received == {"star": "on"} | {f"star_{field}": value for field, value in every.items()}


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
        (pb.SamplingParams(), {}, "output_kind", RequestOutputKind.DELTA),
        (pb.SamplingParams(), {}, "extra_args", {"star": "on"}),
    ],
)
def test_sampling_params(message, defaults, field, value):
    params = messages.sampling_params(message, defaults, max_tokens=7, extra_args={"star": "on"})
    assert getattr(params, field) == value


@pytest.mark.parametrize(
    "message",
    [pb.SamplingParams(temperature=-1), pb.SamplingParams(top_p=0), pb.SamplingParams(min_tokens=8)],
    ids=["temperature", "top_p", "min above max"],
)
def test_bad_sampling_params_are_the_clients_error(message):
    with pytest.raises(VLLMValidationError):
        messages.sampling_params(message, {}, max_tokens=7, extra_args={})


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (pb.GenerateStreamRequest(text="ä"), {"prompt": "ä"}),
        (pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=[0, 7])), {"prompt_token_ids": [0, 7]}),
    ],
    ids=["text", "token ids"],
)
def test_prompt(request_, prompt):
    assert messages.prompt_of(request_) == prompt


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateStreamRequest(), "prompt"),
        (pb.GenerateStreamRequest(text=""), "text"),
        (pb.GenerateStreamRequest(token_ids=pb.TokenIds()), "token_ids"),
    ],
    ids=["none", "text", "token ids"],
)
def test_an_empty_prompt_is_refused_by_its_field(request_, field):
    with pytest.raises(VLLMValidationError) as refused:
        messages.prompt_of(request_)
    assert refused.value.parameter == field


@pytest.mark.parametrize("reason", [name for name in FINISH_REASON_STRINGS if name != "error"])
def test_every_finish_reason_of_vllm_has_a_number(reason):
    plan = {"attention": "dense", "prompt_tokens": 3}
    final = messages.final(output(finish_reason=reason), pb.Usage(), plan).final
    assert pb.Final.FinishReason.Name(final.finish_reason) == f"FINISH_REASON_{reason.upper()}"


@pytest.mark.parametrize(
    ("reason", "which", "value"),
    [(None, None, None), ("END", "stop_string", "END"), (0, "stop_token_id", 0)],
    ids=["end token", "string", "token zero"],
)
def test_stop_reason(reason, which, value):
    plan = {"attention": "dense", "prompt_tokens": 3}
    final = messages.final(output(finish_reason="stop", stop_reason=reason), pb.Usage(), plan).final
    assert final.WhichOneof("stop_reason") == which
    assert which is None or getattr(final, which) == value


def test_star_plan_message():
    plan = make_plan(
        1000,
        StarOptions(mode="on", block_size=256, anchor_size=64, overlap_size=32, query_tokens=40),
        None,
        32,
    )
    message = messages.plan_message(describe(plan, 1000))
    assert message.attention == pb.Plan.ATTENTION_STAR
    assert (message.star_blocks, message.block_size, message.anchor_size) == (4, 256, 64)
    assert (message.overlap_size, message.context_end, message.prompt_tokens) == (32, 960, 1000)
    assert 0 < message.keys_attended < message.dense_keys == 500500
    assert message.keys_per_context_token == pytest.approx(plan.context_keys_per_token(), abs=0.06)


def test_dense_plan_message_counts_the_keys():
    message = messages.plan_message(describe(None, 1000))
    assert message.attention == pb.Plan.ATTENTION_DENSE
    assert message.keys_attended == message.dense_keys == 500500
    assert (message.star_blocks, message.keys_per_context_token) == (0, 500.5)
