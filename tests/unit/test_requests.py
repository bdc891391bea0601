"""A request's options at the fronts: resolved into its own parameters, told to the client, or refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from attention_backends.attamba.count import prompt_keys
from engine_ext.metrics import front_metrics
from engine_ext.models.attamba_config import AttambaConfig
from engine_ext.requests import (
    PlannedPrompt,
    check_early,
    refuse_beam_search,
    resolve_request,
    response_plans,
    star_requests,
)
from scheduler.plan import PLAN_KEY, StarPlan
from scheduler.share import SHARDS
from tests.unit.test_activation import CPU, fake_config

STAR = {"star": "on", "star_block_size": 64}


def processor(additional_config, page: int | None = 16, **changes):
    """An input processor as far as we look at one."""
    config = fake_config(**changes)
    config.additional_config = additional_config
    config.cache_config.effective_attention_block_size = page
    return SimpleNamespace(vllm_config=config, tokenizer=TOKENIZER)


TOKENIZER = SimpleNamespace(
    encode=lambda text, add_special_tokens: [3, ord(text)], decode=lambda ids: "\n" if ids == [10] else ""
)
"""One that begins a text with a token of its own, and drops a space at the start of one."""


def processed(extra_args, length: int = 300, resumable: bool = False):
    params = SamplingParams(extra_args=extra_args)
    return SimpleNamespace(
        sampling_params=params,
        prompt_token_ids=[1] * length,
        prompt_embeds=None,
        mm_features=None,
        resumable=resumable,
    )


ON = {"starling": {}}


def test_options_are_replaced_by_the_plan_and_others_kept():
    mine = {"theirs": 7} | STAR
    request = processed(mine)
    resolve_request(processor(ON), request)
    assert request.sampling_params.extra_args == {"theirs": 7, PLAN_KEY: [64, 64, 0, 150, 300, 1, False]}
    assert mine == {"theirs": 7} | STAR  # the caller's own, which other prompts may share


@pytest.mark.parametrize(("extra_args", "left"), [(None, None), ({"theirs": 7}, {"theirs": 7}), ({"star": "off"}, {})])
def test_dense_requests_carry_nothing(extra_args, left):
    request = processed(extra_args)
    resolve_request(processor(ON), request)
    assert request.sampling_params.extra_args == left


TRANSFER = SimpleNamespace(kv_connector="StarConnector", kv_connector_extra_config={SHARDS: 3})


def over_shards(extra_args, length: int):
    """The plan of a request to three replicas of 99 pages of 16 tokens."""
    changes = CPU | {"kv_transfer_config": TRANSFER, "additional_config": {"starling": {"star": {"shards": "on"}}}}
    given = processor(changes.pop("additional_config"), **changes)
    given.vllm_config.parallel_config.data_parallel_size = 3
    given.vllm_config.cache_config.num_gpu_blocks = 300
    return star_requests(given).plan(extra_args, length).plan


def test_a_plan_has_as_many_replicas_as_its_kv_needs():
    assert [over_shards(STAR | {"star_shards": "on"}, length).replicas for length in (1000, 3000)] == [3, 3]
    two = {"star": "on", "star_block_size": 128, "star_replicas": 2}
    assert over_shards(two, 1500).shards
    with pytest.raises(VLLMValidationError, match=r"star_shards='on' is refused: 20 star blocks .* than 2 replicas"):
        over_shards(two, 3000)


@pytest.mark.parametrize("extra_args", [{}, STAR | {"star_shards": "off"}, STAR | {"star_replicas": 1}])
def test_what_runs_on_one_replica_must_fit_there(extra_args):
    over_shards(extra_args, 99 * 16 - 1)
    with pytest.raises(VLLMValidationError, match=r"1584 tokens runs on one replica, whose KV memory holds 1584"):
        over_shards(extra_args, 99 * 16)


def test_pooling_requests_are_none_of_ours():
    resolve_request(processor({"starling": {"star": {"mode": "on"}}}), SimpleNamespace(sampling_params=None))


def test_without_activation_a_star_key_is_refused_and_says_how_to_activate():
    request = processed(STAR)
    with pytest.raises(VLLMValidationError, match=r"not activated.*starling serve.*--additional-config") as refused:
        resolve_request(processor({}), request)
    assert refused.value.parameter == "star"
    dense = processed({"theirs": 7, PLAN_KEY[:3]: 1})
    resolve_request(processor({}), dense)
    assert dense.sampling_params.extra_args == {"theirs": 7, PLAN_KEY[:3]: 1}


@pytest.mark.parametrize("forged", [{PLAN_KEY: [64, 64, 0, 10, 20]}, {"star_": 1}])
def test_keys_of_ours_can_not_be_forged(forged):
    with pytest.raises(VLLMValidationError, match="no such star option"):
        resolve_request(processor(ON), processed(forged))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": object()}, "star='on' is refused: speculative decoding"),
        ({"page": None}, "no one KV page size"),
    ],
)
def test_engines_that_can_not_run_star_refuse_it_and_serve_dense(changes, message):
    front = processor(ON, **changes)
    with pytest.raises(VLLMValidationError, match=message):
        resolve_request(front, processed(STAR))
    resolve_request(front, processed(None))


ATTAMBA = {
    "page": 128,
    "model_config__hf_text_config": AttambaConfig(token_chunk=8, leading_tokens=16),
    "model_config__get_sliding_window": lambda: None,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"star_block_size": 64},
            "star_block_size=64 is refused: .* page of 128 tokens. Allowed: a multiple of 128",
        ),
        ({"star_block_size": 256, "star_anchor_size": 64}, "star_anchor_size=64 is refused.*a multiple of 128"),
        ({"star_block_size": 256, "star_overlap_size": 128}, "star_overlap_size=128 is refused.*Attamba.*Allowed: 0"),
    ],
)
def test_sizes_of_attamba_are_pages_of_chunk_states_and_have_no_overlap(options, message):
    front = processor(ON, **ATTAMBA)
    with pytest.raises(VLLMValidationError, match=message):
        resolve_request(front, processed({"star": "on"} | options, length=1000))


def test_plans_of_attamba_round_up_to_pages_of_chunk_states_and_count_its_own_keys():
    front, request = processor(ON, **ATTAMBA), processed({"star": "on", "star_num_blocks": 3}, length=1000)
    resolve_request(front, request)
    assert request.sampling_params.extra_args == {PLAN_KEY: [384, 384, 0, 500, 1000, 1, False]}
    resolver = star_requests(front)
    for plan in (None, StarPlan(384, 384, 0, 500, 1000)):
        told = resolver.describe(PlannedPrompt(plan, 1000))
        assert told == told | prompt_keys(plan, 1000, 8, 16, layers=8)
    assert told["keys_attended"] < told["dense_keys"]


def test_sessions_are_refused():
    with pytest.raises(VLLMValidationError, match="streaming-input session"):
        resolve_request(processor(ON), processed(STAR, resumable=True))


def test_the_client_is_told_before_the_response_starts():
    front, told = processor(ON), {}
    prompts = [{"prompt_token_ids": [1] * 300}, {"prompt_token_ids": [1] * 300}]
    token = response_plans.set(told)
    try:
        for engine_input, extra_args in zip(prompts, (STAR, {}), strict=True):
            check_early(front, engine_input, SamplingParams(extra_args=extra_args))  # the responses API asks twice
            check_early(front, engine_input, SamplingParams(extra_args=extra_args))
    finally:
        response_plans.reset(token)
    star, dense = told.values()
    assert (star["attention"], star["star_blocks"], star["context_end"]) == ("star", 3, 150)
    assert dense == {"attention": "dense", "prompt_tokens": 300, "padding_tokens": 0}
    with pytest.raises(VLLMValidationError, match="star_block_size=65"):
        check_early(front, {"prompt_token_ids": [1] * 300}, SamplingParams(extra_args=STAR | {"star_block_size": 65}))


def test_rejections_are_counted_by_option_and_not_by_what_clients_make_up():
    counter = front_metrics().rejections
    for key, label in (("star_anchor_size", "star_anchor_size"), ("star_made_up", "unknown")):
        before = counter.labels(label)._value.get()
        with pytest.raises(VLLMValidationError):
            star_requests(processor(ON)).plan({"star": "on", key: -1}, 300)
        assert counter.labels(label)._value.get() == before + 1


MARKED = STAR | {"star_segment_token": 7, "star_query_tokens": 10}


def marked(extra_args=MARKED, **changes):
    """A request whose segments of 100, 30 and 60 tokens start with 7, and are followed by a query of 10."""
    request = processed(extra_args)
    segments = [[7] + [token] * (size - 1) for token, size in ((1, 100), (2, 30), (3, 60))]
    request.prompt_token_ids = [*segments[0], *segments[1], *segments[2], *[4] * 10]
    for name, value in changes.items():
        setattr(request, name, value)
    return request


def test_segments_start_at_borders_of_the_prompt_that_the_engine_gets():
    front, request = processor(ON, model_config__max_model_len=300), marked()
    resolve_request(front, request)
    ids = request.prompt_token_ids
    assert (len(ids), [ids.index(token) for token in (1, 2, 3, 4)]) == (262, [1, 129, 193, 252])
    assert ids[100:129] == [10] * 28 + [7]
    assert request.sampling_params.extra_args == {PLAN_KEY: [64, 64, 0, 252, 262, 1, False]}
    planned = star_requests(front).plan(MARKED, 200, marked().prompt_token_ids)
    told = star_requests(front).describe(planned)
    assert (told["prompt_tokens"], told["context_end"], told["padding_tokens"]) == (262, 252, 62)


@pytest.mark.parametrize(
    ("changes", "most", "message"),
    [
        ({}, 262, r"star_segment_token=7 is refused: .* of 200 tokens has 262. Allowed: up to 261 tokens"),
        ({"mm_features": [1]}, 300, "star_segment_token=7 is refused: the prompt has images or embeddings"),
        ({"extra_args": MARKED | {"star_segment_token": 9}}, 300, "star_segment_token=9 .* does not occur"),
    ],
)
def test_segments_that_can_not_be_aligned_are_refused(changes, most, message):
    with pytest.raises(VLLMValidationError, match=message):
        resolve_request(processor(ON, model_config__max_model_len=most), marked(**changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_logprob_token_ids", [[1]] * 199, "prompt_logprob_token_ids='199 rows' is refused"),
        ("routed_experts_prompt_start", 5, "routed_experts_prompt_start=5 is refused"),
    ],
)
def test_segments_are_not_aligned_under_what_counts_the_prompts_own_tokens(name, value, message):
    request = marked()
    setattr(request.sampling_params, name, value)
    with pytest.raises(VLLMValidationError, match=message):
        resolve_request(processor(ON, model_config__max_model_len=300), request)


def test_a_raw_prompt_with_images_is_not_one_of_tokens_alone():
    prompt = {"prompt_token_ids": marked().prompt_token_ids, "multi_modal_data": {"image": object()}}
    front = processor(ON, model_config__max_model_len=300)
    with pytest.raises(VLLMValidationError, match="the prompt has images or embeddings"):
        check_early(front, prompt, SamplingParams(extra_args=MARKED))


def test_a_servers_mark_leaves_other_prompts_as_they_are():
    front = processor({"starling": {"star": {"segment_token": 7}}}, model_config__max_model_len=300)
    for request in (processed(STAR), marked(STAR, mm_features=[1]), marked({})):
        before = list(request.prompt_token_ids)
        resolve_request(front, request)
        assert request.prompt_token_ids == before
    request = marked(STAR | {"star_query_tokens": 10})
    resolve_request(front, request)
    assert len(request.prompt_token_ids) > 200


def test_without_white_space_the_padding_has_to_be_said():
    front = processor(ON, model_config__max_model_len=300)
    for front.tokenizer in (None, SimpleNamespace(encode=lambda *_, **__: [1, 2], decode=lambda ids: "?")):
        front.starling = None
        with pytest.raises(VLLMValidationError, match="star_padding_token=None is refused: star_segment_token=7 needs"):
            resolve_request(front, marked())
        request = marked(MARKED | {"star_padding_token": 5})
        resolve_request(front, request)
        assert request.prompt_token_ids[100:128] == [5] * 28


def test_beam_search_refuses_star_options():
    refuse_beam_search(SimpleNamespace(vllm_xargs=None))
    with pytest.raises(VLLMValidationError, match="star='on' is refused: beam search"):
        refuse_beam_search(SimpleNamespace(vllm_xargs={"theirs": 1, "star": "on"}))
