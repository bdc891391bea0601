"""The option `cache_salt`: which salt a request reaches the engine with, and which requests are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EncoderDecoderInput, build_enc_dec_input, split_enc_dec_input, tokens_input
from vllm.sampling_params import SamplingParams

from starling.config.parsing import OptionError
from starling.engine_ext.front.cache_salt import derived_salt, salt_for
from starling.engine_ext.front.call import Call, current_call
from starling.engine_ext.start import activation
from starling.engine_ext.start.activation import before_engine_config, prepare_server
from tests.unit.engine_ext.front.test_requests import planner

ANN, BOB = Call("key of ann", sees_cached=False), Call("key of bob", sees_cached=False)
TOKENS = {"type": "token", "prompt_token_ids": [1] * 40}


@pytest.fixture
def as_client():
    tokens = []
    yield lambda client: tokens.append(current_call.set(client))
    for token in reversed(tokens):
        current_call.reset(token)


def prepared(setting: str, **prompt):
    """The input with which a request reaches the engine."""
    return planner({"starling": {"cache_salt": setting}}).prepare(TOKENS | prompt, SamplingParams(), "request-1")


def test_by_default_the_salt_is_the_requests():
    assert "cache_salt" not in planner({"starling": {}}).prepare(TOKENS, SamplingParams(), "request-1")
    assert prepared("request", cache_salt="mine")["cache_salt"] == "mine"


def test_a_required_salt_is_taken_as_it_is():
    assert prepared("required", cache_salt="mine")["cache_salt"] == "mine"


@pytest.mark.parametrize("request_id", ["request-1", None], ids=["engine", "before the response"])
@pytest.mark.parametrize("prompt", [TOKENS, TOKENS | {"cache_salt": ""}, "text"], ids=["none", "empty", "text"])
def test_a_request_without_the_required_salt_is_refused(prompt, request_id):
    with pytest.raises(VLLMValidationError, match=r"^cache_salt=.* is refused: .*--cache-salt required") as refused:
        planner({"starling": {"cache_salt": "required"}}).prepare(prompt, SamplingParams(), request_id)
    assert refused.value.parameter == "cache_salt"


def test_salts_of_api_keys_differ_by_key_and_by_the_requests_own_salt(as_client):
    salts = []
    for client in (ANN, BOB):
        as_client(client)
        salts += [prepared("api-key", **given)["cache_salt"] for given in ({}, {"cache_salt": "x"})]
        assert prepared("api-key")["cache_salt"] == salts[-2]
    assert len({*salts}) == 4
    assert not any(client.api_key in salt for client in (ANN, BOB) for salt in salts)


def test_a_salt_is_derived_once_where_a_front_looks_at_the_input_before(as_client):
    as_client(ANN)
    plans = planner({"starling": {"cache_salt": "api-key"}})
    early = plans.prepare(TOKENS | {"cache_salt": "x"}, SamplingParams(), None)
    assert early["cache_salt"] == "x"
    assert plans.prepare(early, SamplingParams(), "request-1")["cache_salt"] == derived_salt(ANN.api_key, "x")


def encoder_decoder_input(**prompt) -> EncoderDecoderInput:
    """A rendered prompt of an encoder-decoder model, whose encoder takes the salt of the client."""
    return build_enc_dec_input(tokens_input([1] * 40) | prompt, tokens_input([2] * 3), decoder_start_token_id=2)


@pytest.mark.parametrize("given", [None, "x"])
def test_a_prompt_of_an_encoder_and_a_decoder_gets_its_salt_where_vllm_reads_it(as_client, given):
    """From the decoder's prompt, whose keys are those of the pages."""
    as_client(ANN)
    prompt = encoder_decoder_input(**{} if given is None else {"cache_salt": given})
    plans = planner({"starling": {"cache_salt": "api-key"}}, model_config__is_encoder_decoder=True)
    _, decoder = split_enc_dec_input(plans.prepare(prompt, SamplingParams(), "request-1"))
    assert decoder["cache_salt"] == derived_salt(ANN.api_key, given)
    assert decoder["prompt_token_ids"] == [2] * 3
    assert prompt["decoder_prompt"].get("cache_salt") == given, "the client's input, which it may use again"


def test_an_encoder_decoder_prompt_without_the_required_salt_is_refused():
    plans = planner({"starling": {"cache_salt": "required"}})
    with pytest.raises(VLLMValidationError, match="--cache-salt required"):
        plans.prepare(encoder_decoder_input(), SamplingParams(), "request-1")
    _, decoder = split_enc_dec_input(
        plans.prepare(encoder_decoder_input(cache_salt="mine"), SamplingParams(), "request-1")
    )
    assert decoder["cache_salt"] == "mine"


@pytest.mark.parametrize("encoder", ["text", {"prompt": "text"}], ids=["text", "mapping"])
def test_a_raw_encoder_decoder_prompt_gets_its_salt_at_the_encoder(as_client, encoder):
    """There vLLM reads it where it renders the prompt."""
    as_client(ANN)
    raw = {"encoder_prompt": encoder, "decoder_prompt": None}
    plans = planner({"starling": {"cache_salt": "api-key"}})
    if encoder == "text":
        with pytest.raises(VLLMValidationError, match="a prompt that is given as a whole"):
            plans.prepare(raw, SamplingParams(), "request-1")
    else:
        prepared = plans.prepare(raw, SamplingParams(), "request-1")
        assert prepared["encoder_prompt"] == encoder | {"cache_salt": derived_salt(ANN.api_key, None)}


@pytest.mark.parametrize("client", [None, Call("", sees_cached=False)], ids=["no client", "no key"])
def test_a_request_without_the_key_that_gives_its_salt_is_refused(as_client, client):
    as_client(client)
    with pytest.raises(VLLMValidationError, match="derives it from the API key"):
        prepared("api-key", cache_salt="mine")


def test_a_derived_salt_is_one_that_vllm_accepts():
    from vllm.entrypoints.generate.base.protocol import validate_cache_salt

    validate_cache_salt(salt_for("api-key", "a" * 128, ANN))
    validate_cache_salt(salt_for("api-key", "\ud800", ANN))


def server_args(**values) -> SimpleNamespace:
    return SimpleNamespace(additional_config={"starling": {"cache_salt": "api-key"}}, middleware=[], **values)


def test_a_server_without_api_keys_does_not_derive_salts_from_them(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(OptionError, match=r"cache_salt='api-key' is refused: the server has no API keys"):
        prepare_server(server_args(api_key=None))
    prepare_server(server_args(api_key=["key"]))
    monkeypatch.setenv("VLLM_API_KEY", "key")
    prepare_server(server_args(api_key=None))


def test_a_host_without_a_front_needs_no_api_keys(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    args = server_args(api_key=None, headless=True)
    prepare_server(args)
    assert not args.middleware


@pytest.mark.parametrize("setting", ["required", "api-key"])
def test_an_engine_without_a_server_has_no_clients(tmp_path, setting):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    config = {"starling": {"cache_salt": setting}}
    with pytest.raises(OptionError, match="only a server has clients"):
        before_engine_config(EngineArgs(model=str(tmp_path), additional_config=config))
    before_engine_config(AsyncEngineArgs(model=str(tmp_path), additional_config=config))


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ({"preset": "rag"}, True),
        ({"star_segments": "<doc>"}, True),
        ({"star": "on"}, False),
        ({"preset": "rag", "star_segments": "off"}, False),
    ],
)
def test_a_server_with_documents_says_what_was_cached(entry, shown):
    given = {"middleware": [], "api_key": None, "enable_prompt_tokens_details": False}
    args = SimpleNamespace(additional_config={"starling": entry}, **given)
    prepare_server(args)
    assert args.enable_prompt_tokens_details is shown


@pytest.mark.parametrize(
    ("keys", "salt", "warns"),
    [(["a", "b"], "request", True), (["a"], "request", False), (["a", "b"], "api-key", False)],
)
def test_clients_that_share_cached_documents_are_named_at_the_start(keys, salt, warns, monkeypatch):
    said = []
    monkeypatch.setattr(activation.logger, "warning_once", lambda *message: said.append(message))
    entry = {"star_segments": "auto", "cache_salt": salt}
    prepare_server(SimpleNamespace(additional_config={"starling": entry}, middleware=[], api_key=keys))
    assert ["clients share cached documents" in message for message, *_ in said] == [True] * warns
