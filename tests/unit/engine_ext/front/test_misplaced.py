"""Star options that stand where nobody reads them, or that are nearly one: what a client is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.call import Call, current_call
from starling.engine_ext.front.misplaced import explained
from starling.engine_ext.front.requests import check_openai_request
from tests.unit.engine_ext.front.test_requests import ON, STAR, plan_of, planner


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("strar", "star"),
        ("mode", "star"),
        ("block_size", "star_block_size"),
        ("star-block-size", "star_block_size"),
        ("Star_Blok_Size", "star_block_size"),
        ("segments", "star_segments"),
        (" star", "star"),
        ("starling.star", "star"),
        ("blockSize", "star_block_size"),
    ],
)
def test_a_key_that_is_nearly_an_option_is_refused(key, meant):
    with pytest.raises(VLLMValidationError, match=f"{key}=.* is refused: .*no such option, did you mean {meant}") as at:
        plan_of(planner(ON), {"star": "on", key: "on"}, 300)
    assert at.value.parameter == key


def test_keys_of_others_are_left_alone():
    others = {"start": 1, "stats": 2, "kv_transfer_params": {}, "seed_text": "star", "theirs": None, "s": 1}
    assert plan_of(planner(ON), STAR | others, 300).plan is not None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("star", r'star=.*ignores it as a field of the request. Allowed: "vllm_xargs": \{"star": \.\.\.\}'),
        ("star_block_size", r'Allowed: "vllm_xargs": \{"star_block_size"'),
        ("star_blocksize", r'Allowed: "vllm_xargs": \{"star_block_size"'),
        ("extra_args", "it is a parameter of Python's SamplingParams. Allowed: vllm_xargs"),
        (
            "star_library",
            "it is an option of the server, --star-library, and not of a request. Allowed: star, star_min",
        ),
    ],
)
def test_options_at_the_top_level_of_a_requests_json_are_refused(field, message):
    with pytest.raises(VLLMValidationError, match=message) as error:
        check_openai_request(SimpleNamespace(model_extra={"theirs": 1, field: 1}))
    assert error.value.parameter == field


@pytest.mark.parametrize(
    ("field", "value", "reason", "option"),
    [
        (
            "extra_body",
            {"vllm_xargs": {"star_block_size": 64}},
            "argument of OpenAI's Python client",
            "star_block_size",
        ),
        ("extra_body", {"vllm_xargs": None}, "argument of OpenAI's Python client", "star"),
        ("extra_body", {"star_blok_size": 64}, "argument of OpenAI's Python client", "star_block_size"),
        ("vllm_xarg", {"star_segments": "auto"}, "did you mean vllm_xargs", "star_segments"),
        ("vllm-xargs", "on", "did you mean vllm_xargs", "star"),
        ("sampling_params", {"star": "on"}, "the parameters are fields of the request", "star"),
        ("sampling_params", {"extra_args": {"star_quality": "fast"}}, "are fields of the request", "star_quality"),
        ("additional_config", {"starling": {"star": "on"}}, "option of the server", "star"),
        ("starling", {"mode": "on"}, "vLLM ignores it as a field of the request", "star"),
        ("starling", "on", "vLLM ignores it as a field of the request", "star"),
        ("options", {"star": "on"}, "vLLM ignores it", "star"),
        ("xargs", {"star": "on"}, "vLLM ignores it", "star"),
        ("extraArgs", {"star_block_size": 64}, "vLLM ignores it", "star_block_size"),
        ("nvext", {"star": "on"}, "vLLM ignores it", "star"),
        ("params", {"extra_args": {"star": "on"}}, "vLLM ignores it", "star"),
    ],
)
def test_options_in_a_field_that_nobody_reads_are_refused(field, value, reason, option):
    allowed = re.escape(f'Allowed: "vllm_xargs": {{"{option}": ...}} as a field of the request.')
    with pytest.raises(VLLMValidationError, match=f"{field}=.* is refused: .*{reason}.*{allowed}") as error:
        check_openai_request(SimpleNamespace(model_extra={"theirs": 1, field: value}))
    assert error.value.parameter == field


@pytest.fixture
def activated() -> Iterator[None]:
    """A request of a server for which Starling is activated: it has a Call."""
    token = current_call.set(Call())
    yield
    current_call.reset(token)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("cacheSalt", "mine", "no such field, did you mean cache_salt. Allowed: cache_salt"),
        ("cache-salt", "mine", "no such field, did you mean cache_salt. Allowed: cache_salt"),
        ("cache_slat", "mine", "no such field, did you mean cache_salt. Allowed: cache_salt"),
        ("nvext", {"cacheSalt": "mine"}, "no such field, did you mean cache_salt. Allowed: cache_salt"),
        ("extra_body", {"cache_salt": "mine"}, "Python client.* Allowed: cache_salt as a field of the request"),
        ("sessionId", "mine", "no such field, did you mean session_id. Allowed: session_id"),
        ("kv_hints", {}, 'vLLM ignores it as a field of the request. Allowed: "vllm_xargs": {"star_retention": ...}'),
    ],
)
def test_a_field_that_is_nearly_a_salt_or_a_session_is_refused_where_starling_is_activated(
    activated, field, value, says
):
    with pytest.raises(VLLMValidationError, match=says) as error:
        check_openai_request(SimpleNamespace(model_extra={"theirs": 1, field: value}))
    assert error.value.parameter == field


@pytest.mark.parametrize("field", ["cacheSalt", "sessionId", "kv_hints"])
def test_vllms_own_server_ignores_them(field):
    check_openai_request(SimpleNamespace(model_extra={field: "mine"}))


def test_fields_of_other_servers_are_left_alone(activated):
    others = {"cache_prompt": True, "cache_control": {}, "salt": 1, "session": "a", "user_id": "b", "nvext": {"a": 1}}
    check_openai_request(SimpleNamespace(model_extra=others))


@pytest.mark.parametrize("key", ["cacheSalt", "cache-salt", "cache_slat"])
def test_a_misspelled_salt_among_the_options_is_refused(key):
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs has no such option\. Allowed: the field of"):
        plan_of(planner(ON), {key: "mine"}, 300)


@pytest.mark.parametrize(
    "extra",
    [
        None,
        {},
        {"theirs": 1, "mode": 2, "segments": 3, "preset": "theirs"},
        {"sampling_params": {"min_tokens": 1, "mode": "x"}, "extra_body": {"theirs": 1}, "options": "star"},
        {"metadata": {"star": "on"}, "theirs": {"vllm_xargs": {"star": "on"}}},
    ],
)
def test_other_unknown_fields_of_a_requests_json_are_left_to_vllm(extra):
    check_openai_request(SimpleNamespace(model_extra=extra))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"preset": "rag"}, "preset='rag' is refused: it is an option of the server, --preset, and not of a request"),
        ({"cache_salt": "mine"}, "cache_salt='mine' is refused: vllm_xargs has no such option. Allowed: the field of"),
        (
            {"star_library": "/tmp"},
            "it is an option of the server, --star-library, and not of a request. Allowed: star",
        ),
        ({"star_heads": 0.1}, "--star-heads, and not of a request, did you mean star_dense_heads. Allowed"),
        ({"star_block_size": "n/8.5"}, r"star_block_size='n/8.5' is refused: it must be .*a share such as n/8, not 'n"),
        ({"star_heds": 1}, "no such star option, did you mean star_"),
    ],
)
def test_an_option_of_the_server_or_a_wrong_value_is_named(given, says):
    with pytest.raises(VLLMValidationError, match=says) as error:
        plan_of(planner(ON), given, 300)
    assert error.value.parameter == next(iter(given))


def test_a_preset_is_refused_at_the_top_level_of_a_requests_json():
    with pytest.raises(VLLMValidationError, match="preset='rag' is refused: it is an option of the server"):
        check_openai_request(SimpleNamespace(model_extra={"preset": "rag"}))


@pytest.mark.parametrize("value", [None, {"a": 1}, [None]], ids=repr)
@pytest.mark.parametrize(
    ("name", "allowed"),
    [("star_block_size", "a multiple of the KV page"), ("star", "off, on, auto"), ("star_query_tokens", "0 or more")],
)
def test_a_value_that_vllms_request_does_not_take_is_named(name, allowed, value):
    """vLLM's own message lists pydantic's types."""
    with pytest.raises(ValidationError) as error:
        CompletionRequest(model="m", prompt="a", vllm_xargs={name: value})
    parameter = clean_loc_for_param(("body", *error.value.errors()[0]["loc"]))
    message = explained("4 validation errors: ...", parameter)
    assert message.startswith(
        f"{name} is refused: a value in vllm_xargs is a text, a number or a list of them. Allowed: "
    )
    assert allowed in message


def test_other_errors_are_vllms():
    for parameter in (None, "body.prompt", "body.vllm_xargs.theirs"):
        assert explained("as it is", parameter) == "as it is"
