"""Requests for blocks with positions of their own, at the fronts: plans, what is shown, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from starling.client.requests import generate_request
from starling.engine_ext.refusals import BLOCK_POSITIONS_RULES
from starling.engine_ext.requests import KNOWN_SEGMENTS, PLANNED, RequestPlanner
from starling.engine_ext.serving.grpc.messages import star_args
from starling.engine_ext.serving.grpc.outputs import plan_message
from starling.scheduler.star.block_positions import BlockPositionsPlan
from starling.scheduler.star.known_segments import NO_CHAT, KnownSegments
from starling.scheduler.star.request_metadata import KEY, RequestMetadata
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.configs import CPU, drafting, fake_config
from tests.unit.engine_ext.test_requests import TRANSFER

PAGE_SIZE, MARK = 16, 7
OPTIONS = {"star": "on", "star_positions": "block", "star_segment_token": MARK, "star_query_tokens": 10}
ON = {"star": "on", "star_block_size": 16}
IDS = [*[1] * 40, MARK, *[2] * 19, MARK, *[3] * 4, *[4] * 10]
PLAIN = CPU | {
    "model_config__hf_text_config": SimpleNamespace(layer_types=["full_attention"], model_type="llama"),
    "model_config__get_sliding_window": lambda: None,
    "model_config__uses_mrope": False,
    "model_config__max_model_len": 200,
    "compilation_config": SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False)),
    "cache_config__effective_attention_block_size": PAGE_SIZE,
}


def planner(defaults: dict | None = None, **changes) -> RequestPlanner:
    """The planner of a CPU engine, with star options as the server's defaults."""
    config = fake_config(**PLAIN | {"additional_config": {"starling": {"star": defaults or {}}}} | changes)
    return RequestPlanner(config)


def processed(extra_args: dict | None = None, **changes):
    params = SamplingParams(extra_args=OPTIONS if extra_args is None else extra_args)
    fields = {"prompt_token_ids": list(IDS), "prompt_embeds": None, "mm_features": None, "resumable": False}
    return SimpleNamespace(sampling_params=params, **fields | changes)


def test_a_request_has_its_plan_and_the_clients_tokens():
    front, request = planner(), processed(OPTIONS | {"theirs": 1})
    front.resolve(request, None)
    assert request.prompt_token_ids == IDS
    extra = request.sampling_params.extra_args
    assert extra["theirs"] == 1 and not any(key.startswith("star_") for key in extra)
    plan = RequestMetadata.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(extra[KEY]))).plan
    assert isinstance(plan, BlockPositionsPlan)
    assert plan.blocks == ((0, 40), (48, 68), (80, 85)) and plan.context_end == 96
    assert (plan.anchor_size, plan.num_prompt_tokens, plan.num_client_tokens) == (32, 106, len(IDS))


def test_what_a_client_is_shown_counts_its_own_tokens():
    front = planner()
    shown = front.describe(front.plan(OPTIONS, len(IDS), IDS))
    assert (shown["prompt_tokens"], shown["context_end"], shown["padding_tokens"]) == (75, 65, 31)
    assert (shown["attention"], shown["positions"], shown["star_blocks"]) == ("star", "block", 3)
    message = plan_message(shown)
    assert (message.positions, message.prompt_tokens, message.padding_tokens) == (
        pb.StarOptions.POSITIONS_BLOCK,
        75,
        31,
    )
    for options in ({"star": "off"}, ON):
        assert plan_message(front.describe(front.plan(options, 75, IDS))).positions == pb.StarOptions.POSITIONS_PROMPT


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
    assert RequestMetadata.from_wire(shorter.sampling_params.extra_args[KEY]).plan.num_client_tokens == len(IDS) - 30


def test_a_servers_default_leaves_prompts_that_can_not_use_it_at_the_prompts_positions():
    """Many short documents take a page each. A request that asks for them is refused instead."""
    front = planner({"mode": "on", "positions": "block", "segment_token": MARK, "query_tokens": 10})
    many, few = [MARK, 1] * 20 + [1] * 30, IDS
    planned = front.plan({}, len(many), many)
    assert (planned.plan, planned.padding_tokens, planned.token_ids) == (None, 0, many)  # shorter than a block of 1,024
    assert isinstance(front.plan({}, len(few), few).plan, BlockPositionsPlan)
    smaller = front.plan({"star_block_size": 16}, len(many), many)
    assert (smaller.plan.context_end, smaller.plan.block_size) == (60, 16)
    assert not isinstance(smaller.plan, BlockPositionsPlan)
    with pytest.raises(VLLMValidationError, match=r"takes 320 or more\. .*fewer segments"):
        front.plan({"star_positions": "block"}, len(many), many)
    images = front.plan({"star_block_size": 16}, len(IDS), None)
    assert not isinstance(images.plan, BlockPositionsPlan) and images.plan.num_prompt_tokens == len(IDS)


BORDERS = (40, 60, 65)
MESSAGES, TEXTS = KnownSegments("messages", BORDERS), KnownSegments("texts", BORDERS)
AUTO = {"mode": "on", "positions": "block", "segments": "auto"}
BY_OFFSETS = {"star": "on", "star_positions": "block", "star_segments": [40, 60, 65]}


def test_offsets_messages_and_texts_have_one_plan():
    """That of marks at the same tokens, but for the token of the padding."""
    front, ids = planner(), [*IDS[:60], MARK, *IDS[61:65], *IDS[65:]]
    plan = front.plan(BY_OFFSETS, len(ids), ids).plan
    assert (plan.blocks, plan.padding_token) == (((0, 40), (48, 68), (80, 85)), 1)
    marked = front.plan(OPTIONS, len(ids), ids).plan
    assert vars(plan) | {"padding_token": MARK} == vars(marked) and marked.padding_token == MARK
    auto = {"star": "on", "star_positions": "block", "star_segments": "auto"}
    assert front.plan(auto, len(ids), ids, None, MESSAGES).plan == plan
    assert front.plan({"star": "on", "star_positions": "block"}, len(ids), ids, None, TEXTS).plan == plan
    by_default = planner(AUTO).plan({}, len(ids), ids, None, MESSAGES)
    assert by_default.plan == plan and "segments_refusal" not in front.describe(by_default)


def test_a_front_hands_over_the_segments_that_it_knows():
    engine_input = {"type": "token", "prompt_token_ids": IDS, KNOWN_SEGMENTS: MESSAGES}
    made = planner(AUTO).prepare(engine_input, SamplingParams())
    assert made[PLANNED].plan.blocks == ((0, 40), (48, 68), (80, 85))


@pytest.mark.parametrize(
    ("segments", "reason"), [(None, NO_CHAT), (KnownSegments("messages", refusal="it rains"), "it rains")]
)
def test_a_plan_says_why_a_prompt_has_no_segments_by_default(segments, reason):
    front = planner(AUTO | {"block_size": 32, "query_tokens": 10})
    planned = front.plan({}, len(IDS), IDS, None, segments)
    assert planned.plan.blocks == ((0, 32), (32, 64), (64, 65)), "as without segments"
    shown = front.describe(planned)
    assert shown["segments_refusal"] == reason == plan_message(shown).segments_refusal
    with pytest.raises(VLLMValidationError, match=f"star_segments='auto' is refused: {reason}"):
        front.plan({"star_segments": "auto"}, len(IDS), IDS, None, segments)
    for not_asked in ({"mode": "off"}, {"mode": "auto", "min_tokens": len(IDS) + 1}):
        front = planner(AUTO | not_asked)
        assert "segments_refusal" not in front.describe(front.plan({}, len(IDS), IDS, None, segments))


def test_a_default_of_auto_leaves_chats_that_can_not_use_it():
    """Many short messages take a page each; their prompt has positions of the prompt, and no segments."""
    front, many = planner(AUTO), [MARK, 1] * 20 + [1] * 30
    short = KnownSegments("messages", tuple(range(2, 42, 2)))
    assert front.plan({}, len(many), many, None, short).plan is None
    sized = front.plan({"star_block_size": 16, "star_query_tokens": 10}, len(many), many, None, short)
    assert (sized.plan.context_end, sized.plan.block_size, sized.padding_tokens) == (60, 16, 0)
    with pytest.raises(VLLMValidationError, match=r"takes 304 or more\. .*fewer segments"):
        front.plan({"star_segments": "auto"}, len(many), many, None, short)  # its query is the last message


def test_offsets_of_a_prompt_with_images_are_refused():
    for positions in ("block", "prompt"):
        given = BY_OFFSETS | {"star_positions": positions, "star_block_size": 16}
        with pytest.raises(VLLMValidationError, match="is refused: the prompt has images or embeddings"):
            planner().plan(given | {"star_segment_token": None}, len(IDS), None)
    images = planner(AUTO | {"block_size": 16}).plan({}, len(IDS), None, None, None)
    assert not isinstance(images.plan, BlockPositionsPlan)


def test_more_offsets_than_tokens_are_refused_before_they_are_read():
    given = BY_OFFSETS | {"star_segments": ["?"] * 76}
    with pytest.raises(VLLMValidationError, match="it has 76 elements, and the prompt has 75 tokens"):
        planner().plan(given, len(IDS), IDS)


def test_a_prompt_is_split_over_replicas_unless_it_or_the_server_says_otherwise():
    front = planner({"replicas": "auto"}, parallel_config__data_parallel_size=3)
    assert front.plan(OPTIONS, len(IDS), IDS).plan.replicas == 3
    assert front.plan(OPTIONS | {"star_replicas": 1}, len(IDS), IDS).plan.replicas == 1
    front = planner({"replicas": 1}, parallel_config__data_parallel_size=3)
    assert front.plan(OPTIONS, len(IDS), IDS).plan.replicas == 1


def test_the_servers_default_leaves_prompts_with_images_the_positions_of_the_prompt():
    defaults = {"mode": "on", "positions": "block", "segment_token": MARK, "block_size": 16, "query_tokens": 10}
    front = planner(defaults)
    assert isinstance(front.plan({}, len(IDS), IDS).plan, BlockPositionsPlan)
    assert not isinstance(front.plan({}, len(IDS), None).plan, BlockPositionsPlan)
    with pytest.raises(VLLMValidationError, match="star_positions='block' is refused: the prompt has images or"):
        front.plan({"star_positions": "block"}, len(IDS), None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_logprob_token_ids", [[1]] * 74, "prompt_logprob_token_ids='74 rows' is refused: with its segments"),
        ("routed_experts_prompt_start", 5, "routed_experts_prompt_start=5 is refused"),
    ],
)
def test_parameters_that_count_the_clients_tokens_in_the_engine_are_refused(name, value, message):
    request = processed()
    setattr(request.sampling_params, name, value)
    with pytest.raises(VLLMValidationError, match=message):
        planner().resolve(request, None)


def test_a_prompt_that_is_too_long_with_its_padding_is_refused():
    planner(model_config__max_model_len=107).plan(OPTIONS, len(IDS), IDS)
    with pytest.raises(VLLMValidationError, match=r"the prompt of 75 takes 106. Allowed: up to 105 tokens"):
        planner(model_config__max_model_len=106).plan(OPTIONS, len(IDS), IDS)


def test_a_prompt_must_fit_in_the_memory_of_its_replica_with_its_padding():
    """Of three replicas, which a prompt of the server may fill together."""
    divided = {"kv_transfer_config": TRANSFER, "parallel_config__data_parallel_size": 3}
    planner(**divided, cache_config__num_gpu_blocks=3 * 8).plan(OPTIONS, len(IDS), IDS)  # of 7 pages, 112 tokens
    with pytest.raises(VLLMValidationError, match=r"the prompt of 106 tokens runs on one replica, .* holds 96"):
        planner(**divided, cache_config__num_gpu_blocks=3 * 7).plan(OPTIONS, len(IDS), IDS)


def text_model(**fields):
    return {"model_config__hf_text_config": SimpleNamespace(layer_types=["full_attention"], **fields)}


REFUSED = {
    "the kernels run on CPUs and on CUDA devices (xpu)": {"device_config__device_type": "xpu"},
    "started with --star-positions block": {"device_config__device_type": "cuda"},
    "depend on one another (a chunk": text_model(star_blocks_depend="a chunk crosses the border"),
    "speculative decoding": {"speculative_config": drafting("ngram")},
    "M-RoPE": {"model_config__uses_mrope": True},
    "no rotary embedding, so that": text_model(no_rope_layers=[1, 0, 1]),
    "on a GPU the KV cache is fp8": {
        "cache_config__cache_dtype": "fp8_e4m3",
        "device_config__device_type": "cuda",
        "additional_config": {"starling": {"star": {"positions": "block"}}},
    },
    "breakable CUDA graphs are on": {
        "device_config__device_type": "cuda",
        "additional_config": {"starling": {"star": {"positions": "block"}}},
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
        front.plan(OPTIONS, len(IDS), IDS)
    assert str(refused.value).startswith("star_positions='block' is refused: ")
    assert reason in str(refused.value) and "Allowed: prompt." in str(refused.value)
    assert front.plan(ON | {"star_positions": "prompt"}, len(IDS), IDS).plan is not None


def test_every_rule_is_tested(monkeypatch):
    """But the one about processors, as in the test of shards, which share it."""
    assert len(REFUSED) == len(BLOCK_POSITIONS_RULES) - 1
    planner().plan(OPTIONS, len(IDS), IDS)
    on_gpu = {"mode": "on", "positions": "block", "segment_token": MARK}
    planner(on_gpu, device_config__device_type="cuda").plan(OPTIONS, len(IDS), IDS)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: True)  # without it vLLM has no fp8 cache on a CPU
    planner(cache_config__cache_dtype="fp8_e4m3").plan(OPTIONS, len(IDS), IDS)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    eager = {"compilation_config__cudagraph_mode": CUDAGraphMode.NONE}
    planner(on_gpu, device_config__device_type="cuda", **eager).plan(OPTIONS, len(IDS), IDS)


@pytest.mark.parametrize(("given", "number"), [("block", 2), ("prompt", 1), (2, 2)])
def test_clients_of_grpc_name_the_positions(given, number):
    sent = generate_request([1, 2], {"star": {"mode": "on", "positions": given}})
    assert sent.star.positions == number
    assert star_args(sent.star) == {"star": "on", "star_positions": "block" if number == 2 else "prompt"}


@pytest.mark.parametrize(
    ("given", "sent", "read"),
    [
        ([4, 9], pb.StarOptions(segment_offsets=[4, 9]), [4, 9]),
        ("auto", pb.StarOptions(segments=pb.StarOptions.SEGMENTS_AUTO), "auto"),
        (1, pb.StarOptions(segments=pb.StarOptions.SEGMENTS_AUTO), "auto"),
    ],
)
def test_clients_of_grpc_say_where_segments_start(given, sent, read):
    made = generate_request([1, 2], {"star": {"segments": given}})
    assert made.star == sent and star_args(made.star) == {"star_segments": read}


def test_segments_that_the_client_and_the_server_do_not_know_are_refused():
    with pytest.raises(
        ValueError, match=r"star_segments='texts' is refused\. Allowed: auto, or a list of token offsets"
    ):
        generate_request([1, 2], {"star": {"segments": "texts"}})
    args = star_args(pb.StarOptions(segments=7))
    with pytest.raises(VLLMValidationError, match="star_segments=7 is refused: it must be auto or a list"):
        planner().plan(args, len(IDS), IDS)
    both = pb.StarOptions(segments=pb.StarOptions.SEGMENTS_AUTO, segment_offsets=[4])
    with pytest.raises(VLLMValidationError, match=r"segment_offsets=\[4\] is refused: segments already says"):
        star_args(both)


def test_unknown_positions_are_refused_by_the_client_and_by_the_server():
    with pytest.raises(ValueError, match=r"star_positions='own' is refused\. Allowed: prompt, block\."):
        generate_request([1, 2], {"star": {"positions": "own"}})
    assert star_args(pb.StarOptions()) == {}
    args = star_args(pb.StarOptions(positions=7))
    with pytest.raises(VLLMValidationError, match=r"star_positions=7 is refused: .* Allowed: prompt, block"):
        planner().plan(OPTIONS | args, len(IDS), IDS)
