"""Prompts of documents at the fronts: plans, what is shown, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from starling.attention_backends.star.refusals import DOCUMENT_RULES
from starling.client.requests import generate_request
from starling.engine_ext.front.requests import KNOWN_SEGMENTS, PLANNED, RequestPlanner
from starling.engine_ext.serving.grpc.messages import star_args
from starling.engine_ext.serving.grpc.outputs import plan_message
from starling.scheduler.planning.decide import Decision
from starling.scheduler.planning.documents import NO_CHAT
from starling.scheduler.planning.facts import KnownSegments, PromptFacts
from starling.scheduler.planning.plan import num_client_tokens
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.configs import CPU, drafting, fake_config
from tests.unit.engine_ext.front.test_requests import TRANSFER

PAGE_SIZE, MARK = 16, 7
OPTIONS = {"star": "on", "star_segments": "<doc>", "star_query_tokens": 10}
ON = {"star": "on", "star_block_size": 16}
IDS = [*[1] * 40, MARK, *[2] * 19, MARK, *[3] * 4, *[4] * 10]
PLAIN = CPU | {
    "model_config__hf_text_config": SimpleNamespace(layer_types=["full_attention"], model_type="llama"),
    "model_config__get_sliding_window": lambda: None,
    "model_config__uses_mrope": False,
    "model_config__max_model_len": 200,
    "compilation_config__cudagraph_mode": CUDAGraphMode.PIECEWISE,
    "cache_config__effective_attention_block_size": PAGE_SIZE,
}


def planner(defaults: dict | None = None, **changes) -> RequestPlanner:
    """The planner of a CPU engine, with star options as the server's defaults."""
    config = fake_config(**PLAIN | {"additional_config": {"starling": defaults or {}}} | changes)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [MARK] if text == "<doc>" else [3, 4])
    return RequestPlanner(config, tokenizer)


def plan_of(front, options, ids: list[int] | None = IDS, known: KnownSegments | None = None) -> Decision:
    """What is decided of a prompt; one without tokens has an image."""
    return front.plan(options, PromptFacts(len(IDS if ids is None else ids), ids, known))


def processed(extra_args: dict | None = None, **changes):
    params = SamplingParams(extra_args=OPTIONS if extra_args is None else extra_args)
    fields = {"prompt_token_ids": list(IDS), "prompt_embeds": None, "mm_features": None, "resumable": False}
    fields |= {"lora_request": None, "kv_hints": None}
    return SimpleNamespace(sampling_params=params, **fields | changes)


def test_a_request_has_its_plan_and_the_clients_tokens():
    front, request = planner(), processed(OPTIONS | {"theirs": 1})
    front.resolve(request, None)
    assert request.prompt_token_ids == IDS
    extra = request.sampling_params.extra_args
    assert extra["theirs"] == 1 and not any(key.startswith("star_") for key in extra)
    plan = RequestMetadata.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(extra[KEY]))).plan
    assert plan and plan.documents
    assert plan.documents == ((0, 40), (48, 68), (80, 85)) and plan.context_end == 96
    assert (plan.anchor_size, plan.num_prompt_tokens, num_client_tokens(plan)) == (32, 106, len(IDS))


def test_what_a_client_is_shown_counts_its_own_tokens():
    front = planner()
    shown = front.describe(plan_of(front, OPTIONS))
    assert (shown["prompt_tokens"], shown["context_end"], shown["padding_tokens"]) == (75, 65, 31)
    assert (shown["attention"], shown["documents"], shown["star_blocks"]) == ("star", True, 3)
    message = plan_message(shown)
    assert (message.documents, message.prompt_tokens, message.padding_tokens) == (True, 75, 31)
    for options in ({"star": "off"}, ON):
        message = plan_message(front.describe(plan_of(front, options)))
        assert not message.documents
        assert message.HasField("why") is (options != ON)


def test_a_prompt_is_planned_once():
    """The plan that ``prepare`` has made is that of ``resolve``, unless vLLM has changed the prompt since."""
    front = planner()
    made = front.prepare({"type": "token", "prompt_token_ids": IDS}, SamplingParams(extra_args=OPTIONS))
    assert made["prompt_token_ids"] == IDS and made[PLANNED].plan.num_prompt_tokens == 106
    request = processed()
    front.resolve(request, made)
    assert request.sampling_params.extra_args[KEY] == RequestMetadata(made[PLANNED].plan).to_wire()
    shorter = processed(prompt_token_ids=IDS[30:])
    front.resolve(shorter, made)
    assert num_client_tokens(RequestMetadata.from_wire(shorter.sampling_params.extra_args[KEY]).plan) == len(IDS) - 30


def test_a_servers_default_leaves_prompts_that_can_not_use_it_without_documents():
    """Many short documents take a page each. A request that asks for them is refused instead."""
    front = planner({"star": "on", "star_segments": "<doc>", "star_query_tokens": 10})
    many = [MARK, 1] * 20 + [1] * 30
    assert plan_of(front, {}).plan.documents
    smaller = plan_of(front, {"star_block_size": 16}, many)
    assert not smaller.plan.documents and smaller.plan.block_size == 16
    assert smaller.why.startswith(
        "no documents: with each document on a KV page of 16 tokens the prompt of 70 takes 304 or more"
    )
    with pytest.raises(VLLMValidationError, match=r"takes 320 or more\. .*fewer documents"):
        plan_of(front, {"star_segments": "<doc>", "star_query_tokens": 1}, many)
    images = plan_of(front, {"star_block_size": 16}, None)
    assert not images.plan.documents and images.plan.num_prompt_tokens == len(IDS)


BORDERS = (40, 60, 65)
MESSAGES, TEXTS = KnownSegments("messages", BORDERS), KnownSegments("texts", BORDERS)
AUTO = {"star": "on", "star_segments": "auto"}
BY_OFFSETS = {"star": "on", "star_segments": [40, 60, 65]}


def test_offsets_messages_and_texts_have_one_plan():
    """That of marks at the same tokens, but for the token of the padding."""
    front, ids = planner(), [*IDS[:60], MARK, *IDS[61:65], *IDS[65:]]
    plan = plan_of(front, BY_OFFSETS, ids).plan
    assert (plan.documents, plan.padding_token) == (((0, 40), (48, 68), (80, 85)), 1)
    marked = plan_of(front, OPTIONS, ids).plan
    assert replace(plan, padding_token=MARK) == marked
    assert plan_of(front, AUTO, ids, MESSAGES).plan == plan
    assert plan_of(front, {"star": "on"}, ids, TEXTS).plan == plan
    by_default = plan_of(planner(AUTO), {}, ids, MESSAGES)
    assert by_default.plan == plan and "why" not in front.describe(by_default)


def test_a_front_hands_over_the_segments_that_it_knows():
    engine_input = {"type": "token", "prompt_token_ids": IDS, KNOWN_SEGMENTS: MESSAGES}
    made = planner(AUTO).prepare(engine_input, SamplingParams())
    assert made[PLANNED].plan.documents == ((0, 40), (48, 68), (80, 85))


@pytest.mark.parametrize(
    ("segments", "reason"), [(None, NO_CHAT), (KnownSegments("messages", refusal="it rains"), "it rains")]
)
def test_a_plan_says_why_a_prompt_has_no_documents_by_default(segments, reason):
    front = planner(AUTO | {"star_block_size": 32, "star_query_tokens": 10})
    decision = plan_of(front, {}, IDS, segments)
    assert decision.plan == plan_of(front, {"star_segments": "off"}).plan, "as without a default"
    shown = front.describe(decision)
    assert shown["why"] == f"no documents: {reason}" == plan_message(shown).why
    with pytest.raises(VLLMValidationError, match=f"star_segments='auto' is refused: {reason}"):
        plan_of(front, {"star_segments": "auto"}, IDS, segments)


def test_more_offsets_than_tokens_are_refused_before_they_are_read():
    given = BY_OFFSETS | {"star_segments": ["?"] * 76}
    with pytest.raises(VLLMValidationError, match="it has 76 elements, and the prompt has 75 tokens"):
        plan_of(planner(), given)


def test_a_prompt_is_split_over_replicas_unless_it_or_the_server_says_otherwise():
    front = planner({"star_replicas": "auto"}, parallel_config__data_parallel_size=3)
    assert plan_of(front, OPTIONS).plan.replicas == 3
    assert plan_of(front, OPTIONS | {"star_replicas": 1}).plan.replicas == 1
    front = planner({"star_replicas": 1}, parallel_config__data_parallel_size=3)
    assert plan_of(front, OPTIONS).plan.replicas == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_logprob_token_ids", [[1]] * 74, "prompt_logprob_token_ids='74 rows' is refused: with each document"),
        ("routed_experts_prompt_start", 5, "routed_experts_prompt_start=5 is refused"),
    ],
)
def test_parameters_that_count_the_clients_tokens_in_the_engine_are_refused(name, value, message):
    request = processed()
    setattr(request.sampling_params, name, value)
    with pytest.raises(VLLMValidationError, match=message):
        planner().resolve(request, None)


def test_a_prompt_that_is_too_long_with_its_padding_is_refused():
    plan_of(planner(model_config__max_model_len=107), OPTIONS)
    with pytest.raises(VLLMValidationError, match=r"the prompt of 75 takes 106. Allowed: up to 105 tokens"):
        plan_of(planner(model_config__max_model_len=106), OPTIONS)


def test_a_prompt_must_fit_in_the_memory_of_its_replica_with_its_padding():
    """Of three replicas, which a prompt of the server may fill together."""
    divided = {"kv_transfer_config": TRANSFER, "parallel_config__data_parallel_size": 3}
    plan_of(planner(**divided, cache_config__num_gpu_blocks=3 * 8), OPTIONS)  # of 7 pages, 112 tokens
    with pytest.raises(VLLMValidationError, match=r"the prompt of 106 tokens runs on one replica, .* holds 96"):
        plan_of(planner(**divided, cache_config__num_gpu_blocks=3 * 7), OPTIONS)


def text_model(**fields):
    return {"model_config__hf_text_config": SimpleNamespace(layer_types=["full_attention"], **fields)}


REFUSED = {
    "the kernels run on CPUs and on CUDA devices (xpu)": {"device_config__device_type": "xpu"},
    "started with --star-segments": {"device_config__device_type": "cuda"},
    "depend on one another (a chunk": text_model(star_blocks_depend="a chunk crosses the border"),
    "speculative decoding": {"speculative_config": drafting("ngram")},
    "M-RoPE": {"model_config__uses_mrope": True},
    "no rotary embedding, so that": text_model(no_rope_layers=[1, 0, 1]),
    "on a GPU the KV cache is fp8": {
        "cache_config__cache_dtype": "fp8_e4m3",
        "device_config__device_type": "cuda",
        "additional_config": {"starling": {"star_segments": "auto"}},
    },
    "breakable CUDA graphs are on": {
        "device_config__device_type": "cuda",
        "additional_config": {"starling": {"star_segments": "auto"}},
    },
    "cpu_attention=vllm": {"additional_config": {"starling": {"cpu_attention": "vllm"}}},
    "multiples of 16": {"model_config__get_head_size": lambda: 72},
    "several groups of layers": {
        "starling_reports": [{"star": None, "split": None, "block_positions": "several groups of layers"}]
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_engines_that_can_not_attend_to_such_blocks_refuse_them_alone(reason, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", str(int(reason.startswith("breakable"))))
    front = planner(**REFUSED[reason])
    with pytest.raises(VLLMValidationError) as refused:
        plan_of(front, OPTIONS)
    assert str(refused.value).startswith("star_segments='<doc>' is refused: ")
    assert reason in str(refused.value) and "Allowed: off." in str(refused.value)
    assert plan_of(front, ON | {"star_segments": "off"}).plan is not None


def test_every_rule_is_tested(monkeypatch):
    """But the one about processors, as in the test of shards, which share it."""
    assert len(REFUSED) == len(DOCUMENT_RULES) - 1
    plan_of(planner(), OPTIONS)
    on_gpu = {"star": "on", "star_segments": "<doc>"}
    plan_of(planner(on_gpu, device_config__device_type="cuda"), OPTIONS)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: True)  # without it vLLM has no fp8 cache on a CPU
    plan_of(planner(cache_config__cache_dtype="fp8_e4m3"), OPTIONS)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    eager = {"compilation_config__cudagraph_mode": CUDAGraphMode.NONE}
    plan_of(planner(on_gpu, device_config__device_type="cuda", **eager), OPTIONS)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ([4, 9], pb.StarOptions(segment_offsets=[4, 9])),
        ("auto", pb.StarOptions(segments="auto")),
        ("<file_sep>", pb.StarOptions(segments="<file_sep>")),
    ],
)
def test_clients_of_grpc_say_where_documents_start(given, sent):
    for made in (
        generate_request([1, 2], {"star": {"segments": given}}),
        generate_request([1, 2], {"star_segments": given}),
    ):
        assert made.star == sent and star_args(made.star) == {"star_segments": given}


def test_two_fields_that_say_where_documents_start_are_refused():
    both = pb.StarOptions(segments="auto", segment_offsets=[4])
    with pytest.raises(VLLMValidationError, match=r"segment_offsets=\[4\] is refused: segments already says"):
        star_args(both)
