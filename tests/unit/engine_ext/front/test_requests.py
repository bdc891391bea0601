"""A request's options at the fronts: they become its metadata, are shown to the client, or are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from starling.attention_backends.attamba.chunks import prompt_keys
from starling.engine_ext.front import bounds
from starling.engine_ext.front.call import Call, current_call
from starling.engine_ext.front.observability import front_metrics
from starling.engine_ext.front.requests import (
    PLANNED,
    RequestPlanner,
    begin_beam_search,
    check_openai_request,
    plan_of_request,
)
from starling.engine_ext.models.configs import AttambaConfig
from starling.engine_ext.serving.grpc.outputs import final
from starling.scheduler.planning.decide import Decision
from starling.scheduler.planning.facts import PromptFacts
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import (
    KEY,
    SHARDS,
    PageFetch,
    PageSource,
    PromptPart,
    RequestMetadata,
    metadata_of,
)
from starling.v1 import inference_pb2 as pb
from starling.vllm_compat.front import IS_BEAM
from tests.unit.engine_ext.configs import CPU, drafting, fake_config

STAR = {"star": "on", "star_block_size": 64}


TOKENIZER = SimpleNamespace(encode=lambda text, add_special_tokens: [7] if text == "<doc>" else [3, 4])


def planner(additional_config, page_size: int | None = 16, tokenizer=TOKENIZER, **changes) -> RequestPlanner:
    """The planner of an engine; ``changes`` are those of fake_config."""
    config = fake_config(**changes)
    config.additional_config = additional_config
    config.cache_config.effective_attention_block_size = page_size
    return RequestPlanner(config, tokenizer)


def plan_of(front: RequestPlanner, extra_args, num_tokens: int, token_ids=None) -> Decision:
    return front.plan(extra_args, PromptFacts(num_tokens, token_ids))


def test_a_model_that_takes_no_overlap_gets_the_papers_anchor():
    def sizes(model_type):
        model = SimpleNamespace(model_type=model_type, layer_types=["full_attention"])
        planned = plan_of(planner(ON, model_config__hf_text_config=model), STAR, 300)
        return planned.plan.anchor_size, planned.plan.overlap_size

    assert (sizes("llama"), sizes("attamba")) == ((16, 48), (64, 0))


def processed(extra_args, length: int = 300):
    params = SamplingParams(extra_args=extra_args)
    return SimpleNamespace(
        sampling_params=params,
        prompt_token_ids=[1] * length,
        prompt_embeds=None,
        mm_features=None,
        resumable=False,
        kv_hints=None,
        lora_request=None,
    )


ON = {"starling": {}}


def test_star_options_are_replaced_by_the_plan_and_others_are_kept():
    mine = {"theirs": 7} | STAR
    request = processed(mine)
    planner(ON).resolve(request, None)
    assert request.sampling_params.extra_args == {
        "theirs": 7,
        KEY: RequestMetadata(StarPlan(64, 16, 48, 150, 300)).to_wire(),
    }
    assert mine == {"theirs": 7} | STAR  # the caller's own, which other prompts may share


def hinted(word: str):
    """A request whose hints, in vLLM's form, have the option star_retention."""
    request = processed(None)
    action = KvHintAction("id", "star_retention", "1", {"retention": word})
    request.kv_hints = KvHintsEnvelope("1", "message", [action])
    return request


@pytest.mark.parametrize("name", ["star_block_size", "star_anchor_size", "star_overlap_size", "star_query_tokens"])
def test_no_number_of_tokens_is_above_the_models_length(name):
    """A number of more than 64 bits reaches no engine."""
    front = planner(ON, model_config__max_model_len=4096)
    plan_of(front, {"star": "on", "star_block_size": 4096, name: 4096}, 4096)
    for value in (4112, "128000000000000M"):
        with pytest.raises(VLLMValidationError) as error:
            plan_of(front, {"star": "on", name: value}, 4000)
        number = 128 * 10**12 * 1024**2 if isinstance(value, str) else value
        reason = "the model's context has 4096 tokens. Allowed: up to 4096."
        assert str(error.value).startswith(f"{name}={number} is refused: {reason}")


def test_a_hint_of_vllms_form_is_carried_as_the_option_is():
    request = hinted("high")
    planner(ON).resolve(request, None)
    assert request.sampling_params.extra_args == {KEY: {"why": "star is off", "retention": "high"}}
    with pytest.raises(VLLMValidationError, match="retention='higher' is refused"):
        planner(ON).resolve(hinted("higher"), None)


@pytest.mark.parametrize(("extra_args", "left"), [(None, {}), ({"theirs": 7}, {"theirs": 7}), ({"star": "off"}, {})])
def test_dense_requests_say_why(extra_args, left):
    request = processed(extra_args)
    planner(ON).resolve(request, None)
    assert request.sampling_params.extra_args == left | {KEY: {"why": "star is off"}}


@pytest.mark.parametrize(
    ("options", "length", "why"),
    [
        ({"star": "off"}, 300, "star is off"),
        ({"star": "auto", "star_min_tokens": 32768}, 1001, "1,001 tokens, below star_min_tokens 32,768"),
        ({"star": "on", "star_block_size": 1024}, 978, "a context of 489 tokens is one star block of 1,024"),
    ],
)
def test_every_dense_plan_says_why(options, length, why):
    front = planner(ON)
    shown = front.describe(plan_of(front, options, length))
    assert shown == {"attention": "dense", "prompt_tokens": length, "why": why}


def test_a_quality_is_what_the_server_says():
    sizes = {"fast": "n/16", "balanced": "n/8", "careful": "dense"}
    front = planner({"starling": {"star": "on", "star_quality_sizes": sizes}})
    plans = [front.describe(plan_of(front, {"star_quality": word}, 4096)) for word in (*sizes, None)]
    assert [plan.get("block_size") for plan in plans] == [256, 512, None, 512]
    assert plans[2]["why"] == "on this server star_quality=careful is dense"


def test_a_context_of_one_star_block_is_counted_and_shown_as_dense():
    """Its attention is dense, and so are its page keys."""
    counts = {name: front_metrics().requests.labels(name)._value for name in ("dense", "star")}
    before = {name: count.get() for name, count in counts.items()}
    front = planner({"starling": {"star": "on", "star_block_size": 64}})
    for length in (128, 130):  # 64 and 65 tokens of context
        request = processed(None, length=length)
        front.resolve(request, None)
        is_star = length == 130
        assert ("plan" in request.sampling_params.extra_args[KEY]) is is_star
        planned = plan_of(front, None, length)
        assert front.describe(planned)["attention"] == ("star" if is_star else "dense")
        assert final(
            SimpleNamespace(index=0, finish_reason=None, stop_reason=None), pb.Usage(), front.describe(planned)
        ).final.plan.attention == (pb.Plan.ATTENTION_STAR if is_star else pb.Plan.ATTENTION_DENSE)
    assert {name: count.get() - before[name] for name, count in counts.items()} == {"dense": 1, "star": 1}


TRANSFER = SimpleNamespace(kv_connector="StarConnector", kv_connector_extra_config={SHARDS: 3})


def plan_on_three_replicas(extra_args, length: int):
    """The plan of a request to three replicas of 99 pages of 16 tokens, with shards by default."""
    changes = CPU | {"kv_transfer_config": TRANSFER, "additional_config": {"starling": {"star_shards": "on"}}}
    changes |= {"parallel_config__data_parallel_size": 3, "cache_config__num_gpu_blocks": 300}
    return plan_of(planner(changes.pop("additional_config"), **changes), extra_args, length).plan


def test_a_plan_has_as_many_replicas_as_its_kv_needs():
    assert [plan_on_three_replicas(STAR | {"star_shards": "on"}, length).replicas for length in (1000, 3000)] == [3, 3]
    two = {"star": "on", "star_block_size": 128, "star_replicas": 2}
    assert plan_on_three_replicas(two, 1500).shards
    with pytest.raises(VLLMValidationError, match=r"star_shards='on' is refused: 20 star blocks .* than 2 replicas"):
        plan_on_three_replicas(two, 3000)


@pytest.mark.parametrize("extra_args", [{}, STAR | {"star_shards": "off"}, STAR | {"star_replicas": 1}])
def test_a_prompt_on_one_replica_must_fit_in_its_memory(extra_args):
    plan_on_three_replicas(extra_args, 99 * 16 - 1)
    with pytest.raises(VLLMValidationError, match=r"1584 tokens runs on one replica, whose KV memory holds 1584"):
        plan_on_three_replicas(extra_args, 99 * 16)


def test_without_activation_a_star_key_is_refused_with_how_to_activate():
    request = processed(STAR)
    with pytest.raises(VLLMValidationError, match=r"not activated.*starling serve.*--additional-config") as refused:
        planner({}).resolve(request, None)
    assert refused.value.parameter == "star"
    dense = processed({"theirs": 7, "sta": 1})
    planner({}).resolve(dense, None)
    assert dense.sampling_params.extra_args == {"theirs": 7, "sta": 1}


@pytest.mark.parametrize("additional_config", [ON, {}])
@pytest.mark.parametrize("forged", [{"plan": [64, 64, 0, 10, 20]}, {"part": {"name": "mine"}}, None, 1])
def test_clients_can_not_send_metadata(forged, additional_config):
    with pytest.raises(
        VLLMValidationError, match=r"starling=.*is refused: this key is reserved for Starling"
    ) as refused:
        planner(additional_config).resolve(processed({KEY: forged}), None)
    assert refused.value.parameter == KEY


def test_an_unknown_star_key_is_refused():
    with pytest.raises(VLLMValidationError, match="no such star option"):
        planner(ON).resolve(processed({"star_": 1}), None)


def test_the_metadata_of_a_part_is_sent_as_the_front_made_it():
    metadata = RequestMetadata(StarPlan(64, 64, 0, 150, 300, 2), part=PromptPart("mine", 128, 64))
    request = processed({KEY: metadata}, length=150)
    planner(ON).resolve(request, {"prompt_token_ids": request.prompt_token_ids})
    assert request.sampling_params.extra_args == {KEY: metadata.to_wire()}


def test_a_planned_prompt_keeps_its_plan_and_gets_its_pages():
    fetch = PageFetch((PageSource(128, [1], [{}], 7),))
    plan = StarPlan(128, 64, 0, 200, 300, 2)
    request = processed(STAR | {"theirs": 7, KEY: RequestMetadata(fetch=fetch)})
    planner(ON).resolve(request, {PLANNED: Decision(plan, None, 300)})
    assert request.sampling_params.extra_args == {"theirs": 7, KEY: RequestMetadata(plan, fetch=fetch).to_wire()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": drafting("medusa")}, "star='on' is refused: speculative decoding"),
        ({"page_size": None}, "no one KV page size"),
    ],
)
def test_engines_that_can_not_run_star_refuse_it_and_serve_dense(changes, message):
    front = planner(ON, **changes)
    with pytest.raises(VLLMValidationError, match=message):
        front.resolve(processed(STAR), None)
    front.resolve(processed(None), None)


ATTAMBA = {
    "page_size": 128,
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
    with pytest.raises(VLLMValidationError, match=message):
        planner(ON, **ATTAMBA).resolve(processed({"star": "on"} | options, length=1000), None)


def test_plans_of_attamba_round_up_to_pages_of_chunk_states_and_count_its_own_keys():
    front, request = planner(ON, **ATTAMBA), processed({"star": "on", "star_block_size": "n/3"}, length=1000)
    front.resolve(request, None)
    plan = StarPlan(384, 384, 0, 500, 1000)
    keys = prompt_keys(plan, 1000, 8, 16, layers=8)
    assert request.sampling_params.extra_args == {KEY: RequestMetadata(plan, keys=keys).to_wire()}
    assert plan_of_request(request) == front.describe(Decision(plan, None, 1000))
    for plan in (None, StarPlan(384, 384, 0, 500, 1000)):
        shown = front.describe(Decision(plan, None, 1000))
        assert shown == shown | prompt_keys(plan, 1000, 8, 16, layers=8)
    assert shown["keys_attended"] < shown["dense_keys"]


@pytest.fixture
def noted():
    """The call in which plans and request ids are noted."""
    call = Call()
    token = current_call.set(call)
    yield call
    current_call.reset(token)


def test_plans_and_request_ids_are_noted_before_the_response_starts(noted):
    front = planner(ON)
    given = {"prompt_token_ids": [1] * 300}
    for request_id, extra_args in (("a", STAR), ("b", {})):
        params = SamplingParams(extra_args=extra_args)
        prepared = front.prepare(given, params)  # the Responses API prepares a prompt twice
        assert front.prepare(prepared, params, request_id) is prepared
    assert PLANNED not in given
    star, dense = noted.plans
    assert (star["attention"], star["star_blocks"], star["context_end"]) == ("star", 3, 150)
    assert dense == {"attention": "dense", "prompt_tokens": 300, "why": "star is off"}
    assert noted.request_ids == ["a", "b"]
    with pytest.raises(VLLMValidationError, match="star_block_size=65"):
        front.prepare(given, SamplingParams(extra_args=STAR | {"star_block_size": 65}), "c")
    assert (len(noted.plans), noted.request_ids) == (2, ["a", "b"])


@pytest.mark.parametrize("engine_input", ["text", {"prompt": "text"}, [1, 2]])
def test_prompts_whose_tokens_are_not_known_yet_stay_as_they_are(engine_input, noted):
    assert planner(ON).prepare(engine_input, SamplingParams(extra_args=STAR), "a") is engine_input
    assert noted == Call()


def test_without_activation_prompts_stay_as_they_are_and_star_options_are_refused_early(noted):
    front, given = planner({}), {"prompt_token_ids": [1] * 300}
    assert front.prepare(given, SamplingParams(), "a") is given
    with pytest.raises(VLLMValidationError, match="not activated"):
        front.prepare(given, SamplingParams(extra_args=STAR), "a")
    assert noted == Call()


def test_rejections_are_counted_by_known_options_only():
    counter = front_metrics().rejections
    for key, label in (("star_anchor_size", "star_anchor_size"), ("star_made_up", "unknown")):
        before = counter.labels(label)._value.get()
        with pytest.raises(VLLMValidationError):
            plan_of(planner(ON), {"star": "on", key: -1}, 300)
        assert counter.labels(label)._value.get() == before + 1


DOCUMENTS = {name: value for name, value in CPU.items() if name != "additional_config"}
DOCUMENTS |= {"model_config__uses_mrope": False}


def test_the_text_of_a_token_starts_documents():
    front = planner(ON, **DOCUMENTS)
    ids = [1] * 40 + [7] + [2] * 19 + [7] + [3] * 4
    options = {"star": "on", "star_segments": "<doc>"}
    assert plan_of(front, options, len(ids), ids).plan.documents == ((0, 40), (48, 68))
    with pytest.raises(VLLMValidationError, match="star_segments='two words' is refused: it is not one token"):
        plan_of(front, options | {"star_segments": "two words"}, len(ids), ids)
    with pytest.raises(VLLMValidationError, match="star_segments='<doc>' is refused: it is not one token"):
        plan_of(planner(ON, tokenizer=None, **DOCUMENTS), options, len(ids), ids)


@pytest.mark.parametrize("given", [None, {"theirs": 1}, {"star": "off"}, {"star": "auto", "star_block_size": 64}])
def test_beam_search_takes_requests_that_do_not_ask_for_star(given):
    check_openai_request(SimpleNamespace(model_extra=None, vllm_xargs=given, use_beam_search=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"theirs": 1, "star": "on"}, "star='on' is refused: beam search makes a new prompt of each beam"),
        ({"star_block_size": 64}, "star_block_size=64 is refused: beam search"),
        ({"star": "auto", "star_block": 64}, "no such star option"),
    ],
)
def test_beam_search_refuses_star(given, message):
    with pytest.raises(VLLMValidationError, match=message):
        check_openai_request(SimpleNamespace(model_extra=None, vllm_xargs=given, use_beam_search=True))


def test_beam_search_shows_one_plan_for_each_prompt(noted):
    """vLLM makes a new prompt of each beam and token: hundreds of headers break HTTP clients."""
    front = planner(ON)
    for prompt in (300, 500):
        begin_beam_search()
        for length in range(prompt, prompt + 10):
            front.prepare({"type": "token", "prompt_token_ids": [1] * length}, SamplingParams())
    assert [plan["prompt_tokens"] for plan in noted.plans] == [300, 500]


@pytest.mark.parametrize("length", [200, 400], ids=["truncated", "expanded"])
def test_a_prompt_that_vllm_changes_after_its_plan_is_planned_again(length):
    """vLLM renders raw prompts of Python's within the engine: it may truncate them, or expand their images."""
    front = planner(ON)
    prepared = front.prepare({"prompt_token_ids": [1] * 300}, SamplingParams(extra_args=STAR))
    request = processed(STAR, length=length)
    front.resolve(request, prepared)
    plan = RequestMetadata.from_wire(request.sampling_params.extra_args[KEY]).plan
    assert (plan.num_prompt_tokens, plan.context_end) == (length, length // 2)


def test_the_key_of_metadata_is_refused_before_the_response_starts():
    with pytest.raises(VLLMValidationError, match="starling='mine' is refused: this key is reserved for Starling"):
        planner(ON).prepare({"prompt_token_ids": [1] * 300}, SamplingParams(extra_args={KEY: "mine"}))


def test_the_output_of_a_request_says_how_its_prompt_was_prefilled(noted):
    """As a response of a server says it."""
    star, dense = processed(STAR), processed(None)
    for request in (star, dense):
        planner(ON).resolve(request, None)
    planner(ON).prepare({"prompt_token_ids": [1] * 300}, SamplingParams(extra_args=STAR), "id")
    assert noted.plans == [plan_of_request(star)] and noted.plans[0]["keys_attended"] < noted.plans[0]["dense_keys"]
    assert plan_of_request(dense) == {"attention": "dense", "prompt_tokens": 300, "why": "star is off"}
    shown = plan_of_request(star)
    assert (shown["attention"], shown["star_blocks"], shown["context_end"]) == ("star", 3, 150)
    metadata_of(star)  # an engine in this process decodes what samples of one prompt share
    assert plan_of_request(star) == shown
    assert plan_of_request(SimpleNamespace(sampling_params=None)) is None  # a pooling request


def test_prompts_and_choices_of_one_http_request_have_a_bound():
    """vLLM's server calls `generate` for each prompt, and so its hook, before it reads an output of one."""
    requests = planner({"starling": {}})
    token = current_call.set(Call())
    try:
        for index in range(bounds.SEQUENCES.limit // 128):
            requests.prepare({"prompt_token_ids": [1]}, SamplingParams(n=128), f"{index}")
        with pytest.raises(VLLMValidationError, match="prompts times choices is refused"):
            requests.prepare({"prompt_token_ids": [1]}, SamplingParams(), "one more")
        beam = {"prompt_token_ids": [1], IS_BEAM: True}
        current_call.set(Call())
        for index in range(bounds.SEQUENCES.limit + 1):
            requests.prepare(beam, SamplingParams(), f"{index}")
    finally:
        current_call.reset(token)


def test_log_probabilities_of_a_prompt_have_a_bound():
    limit = bounds.PROMPT_LOGPROBS.limit
    requests = planner({"starling": {}})
    params = SamplingParams(prompt_logprobs=31, n=16)
    requests.prepare({"prompt_token_ids": [1] * (limit // 512)}, params, "id")
    with pytest.raises(VLLMValidationError, match=f"it has {limit + 512} values"):
        requests.prepare({"prompt_token_ids": [1] * (limit // 512 + 1)}, params, "id")
