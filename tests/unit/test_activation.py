"""Activation through vLLM's own EngineArgs: what is put in place, what is refused, what is left alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from benchmarks.random_llama import make_random_llama
from engine_ext import plugin
from engine_ext.activation import MIDDLEWARE, add_middleware, parse_config
from engine_ext.refusals import CONNECTORS, RULES, star_refusals
from scheduler.options import OptionError
from tests.parity.harness import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def engine_config(model, **arguments):
    return EngineArgs(model=str(model), enforce_eager=True, **arguments).create_engine_config()


def test_activated_engines_get_our_scheduler_and_worker(model):
    config = engine_config(model, additional_config={"starling": {"star": {"mode": "on", "block_size": 256}}})
    assert config.parallel_config.worker_cls == "engine_ext.worker.StarCPUWorker"
    assert config.scheduler_config.get_scheduler_cls().__name__ == "StarScheduler"
    assert star_refusals(config) == []


def test_engines_that_do_not_ask_are_left_alone(model):
    config = engine_config(model, additional_config={"other": 1})
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "scheduler_cls=.*Starling sets this class",
        ),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker_cls=.*Starling sets this class"),
        ({"star": {"mode": "on", "block_size": 100}}, "star_block_size=100.*multiple of the KV page of 128"),
        (
            {"star": {"mode": "on", "block_size": 256, "anchor_size": 512}},
            "star_anchor_size=512.*larger than",
        ),
        ({"star": {"block": 100}}, "block=100.*no such star option"),
        ({"star": "on"}, "starling.star='on'.*must be an object"),
        ({"entry": {"scheduler": "on"}}, r"starling\.scheduler='on'.*must be an object"),
        ({"entry": {"scheduler": {"fairness": "no"}}}, r"starling\.scheduler\.fairness='no'.*on or off"),
        ({"entry": {"stars": {}}}, "starling.stars=.*no such section"),
        ({"entry": "yes"}, "starling='yes'.*must be an object"),
        (
            {
                "star": {"mode": "auto"},
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                },
            },
            "star='auto' is refused: speculative decoding",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_at_start(model, arguments, message):
    entry = arguments.pop("entry", {"star": arguments.pop("star", {})})
    with pytest.raises(ValueError, match=message):
        engine_config(model, additional_config={"starling": entry}, **arguments)


def test_star_off_by_default_starts_and_refuses_per_request(model):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    config = engine_config(model, additional_config={"starling": {}}, speculative_config=speculative)
    assert any("speculative decoding" in reason for reason in star_refusals(config))


def test_the_server_gets_the_header_middleware_once():
    args = SimpleNamespace(additional_config={"starling": {}}, middleware=["theirs"])
    add_middleware(args)
    add_middleware(args)
    assert args.middleware == ["theirs", *MIDDLEWARE]
    plain = SimpleNamespace(additional_config={}, middleware=[])
    add_middleware(plain)
    assert plain.middleware == []


def test_no_entry_is_no_activation():
    assert parse_config(None) is None
    assert parse_config({"other": {}}) is None
    assert parse_config({"starling": {}}).star.mode == "off"
    with pytest.raises(OptionError):
        parse_config({"starling": {"star": {"mode": "sometimes"}}})


def fake_config(**changes):
    """A configuration that nothing is held against, with changes by dotted name."""
    model = SimpleNamespace(
        runner_type="generate",
        is_encoder_decoder=False,
        use_mla=False,
        is_attention_free=False,
        hf_text_config=SimpleNamespace(layer_types=["sliding_attention", "full_attention"]),
        get_sliding_window=lambda: 128,
        uses_alibi=False,
        is_mm_prefix_lm=False,
        rswa_window=None,
        is_diffusion=False,
    )
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False)
    config = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        speculative_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        kv_transfer_config=None,
        attention_config=SimpleNamespace(backend=None),
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    for name, value in changes.items():
        owner, _, attribute = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, attribute, value)
    return config


REFUSED = {
    "does not generate": {"model_config__runner_type": "pooling"},
    "encoder-decoder": {"model_config__is_encoder_decoder": True},
    "MLA": {"model_config__use_mla": True},
    "no full-attention layer": {"model_config__hf_text_config": SimpleNamespace(layer_types=["sliding_attention"])},
    "ALiBi": {"model_config__uses_alibi": True},
    "prefix-LM": {"model_config__is_mm_prefix_lm": True},
    "Attamba": {"model_config__hf_text_config": SimpleNamespace(model_type="attamba", layer_types=["full_attention"])},
    "R-SWA": {"model_config__rswa_window": 64},
    "diffusion": {"model_config__is_diffusion": True},
    "speculative": {"speculative_config": object()},
    "decode context": {"parallel_config__decode_context_parallel_size": 2},
    "prefill context": {"parallel_config__prefill_context_parallel_size": 2},
    "dual-batch": {"parallel_config__enable_dbo": True},
    "fast prefill": {"cache_config__kv_sharing_fast_prefill": True},
    "long_prefill_token_threshold=1": {"scheduler_config__long_prefill_token_threshold": 1},
    "LMCacheConnectorV1": {"kv_transfer_config": SimpleNamespace(kv_connector="LMCacheConnectorV1")},
    "FLEX_ATTENTION": {"attention_config__backend": SimpleNamespace(name="FLEX_ATTENTION")},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_each_refusal_names_its_reason(reason):
    (refusal,) = star_refusals(fake_config(**REFUSED[reason]))
    assert reason in refusal


def test_every_rule_is_tested_and_what_works_is_not_refused():
    assert len(REFUSED) == len(RULES)
    assert star_refusals(fake_config()) == []
    allowed = SimpleNamespace(kv_connector=CONNECTORS[0])
    assert star_refusals(fake_config(kv_transfer_config=allowed)) == []
    assert star_refusals(fake_config(attention_config__backend=SimpleNamespace(name="FLASHINFER"))) == []


def test_a_model_without_layer_types_is_judged_by_its_window():
    bare = {"model_config__hf_text_config": SimpleNamespace(layer_types=None)}
    assert star_refusals(fake_config(**bare))
    assert star_refusals(fake_config(**bare, model_config__get_sliding_window=lambda: None)) == []
    assert star_refusals(fake_config(model_config__is_attention_free=True))
