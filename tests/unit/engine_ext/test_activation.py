"""Activation through vLLM's own EngineArgs: what it sets, what it refuses, and engines without it."""

from __future__ import annotations

import contextlib
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import FalconH1Config, GraniteMoeHybridConfig, JambaConfig, Qwen3NextConfig, Zamba2Config
from vllm.config import CUDAGraphMode, ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler

from attention_backends.star.metadata import ROW_FIELDS_WITHOUT_A_SPLIT
from benchmarks.attamba.random_model import make_random_attamba
from benchmarks.random_llama import make_random_llama
from engine_ext import plugin
from engine_ext.activation import (
    MIDDLEWARE,
    PAGE_MIDDLEWARE,
    SCHEDULERS,
    SERVES_PEERS,
    before_engine_config,
    is_one_host,
    parse_config,
    prepare_server,
    star_class,
)
from engine_ext.models.configs import KVShiftLlamaConfig
from engine_ext.refusals import (
    CONNECTORS,
    RULES,
    SHARD_RULES,
    SPLIT_RULES,
    block_positions_refusals,
    replica_set,
    star_refusals,
)
from scheduler.block_reuse import reuse_refusal
from scheduler.star.parsing import OptionError
from scheduler.star.request_metadata import ONE_HOST, default_num_shards
from scheduler.star_scheduler import StarMixin
from tests.parity.harness import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def engine_config(model, **arguments):
    return EngineArgs(model=str(model), enforce_eager=True, **arguments).create_engine_config()


def test_activated_engines_get_starlings_scheduler_and_worker(model):
    config = engine_config(model, additional_config={"starling": {"star": {"mode": "on", "block_size": 256}}})
    assert config.parallel_config.worker_cls == "engine_ext.worker.StarCPUWorker"
    assert config.scheduler_config.get_scheduler_cls().__name__ == "StarScheduler"
    assert star_refusals(config) == []


def test_engines_without_the_entry_are_vllms(model):
    config = engine_config(model, additional_config={"other": 1})
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None


def test_a_front_that_would_not_call_starling_is_refused(model, monkeypatch):
    """`vllm serve` with its Rust front would activate Starling in the engine, and plan no prompt."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    arguments = {"model": str(model), "additional_config": {"starling": {}}}
    with pytest.raises(OptionError, match="VLLM_USE_RUST_FRONTEND='1' is refused: the Rust front reads no star"):
        before_engine_config(AsyncEngineArgs(**arguments))
    before_engine_config(EngineArgs(**arguments))  # no front
    before_engine_config(AsyncEngineArgs(**arguments | {"additional_config": {}}))


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
        ({"entry": {"replicas": 30}}, r"starling\.replicas=30.*must be an object"),
        ({"entry": {"replicas": {"timeout": 0}}}, r"starling\.replicas\.timeout=0.*a number above 0"),
        ({"entry": {"cpu_attention": "ours"}}, r"starling\.cpu_attention='ours'.*auto or vllm"),
        ({"entry": {"live_page": True}}, r"starling\.live_page=True.*off or on"),
        ({"entry": {"live_page": "on"}}, r"starling\.live_page='on'.*only a server has a page"),
        (
            {
                "star": {"mode": "auto"},
                "kv_sharing_fast_prefill": True,
            },
            "star='auto' is refused: KV-sharing fast prefill",
        ),
    ],
)
def test_options_that_exclude_one_another_are_refused_at_the_start(model, arguments, message):
    entry = arguments.pop("entry", {"star": arguments.pop("star", {})})
    with pytest.raises(ValueError, match=message):
        engine_config(model, additional_config={"starling": entry}, **arguments)


@pytest.mark.parametrize(
    ("star", "message"),
    [
        ({"block_size": 256}, None),
        ({"block_size": 64}, "star_block_size=64 is refused.*page of 128.*a multiple of 128"),
        ({"block_size": 256, "overlap_size": 128}, "star_overlap_size=128 is refused.*Attamba.*Allowed: 0"),
    ],
)
def test_sizes_of_attamba_are_checked_against_its_pages_of_chunk_states(tmp_path, star, message):
    plugin.register()
    model = make_random_attamba(tmp_path / "attamba", hidden_size=64, num_attention_heads=2, token_chunk=8)
    refused = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with refused:
        engine_config(model, additional_config={"starling": {"star": {"mode": "on"} | star}})


def test_star_off_by_default_starts_and_refuses_per_request(model):
    config = engine_config(model, additional_config={"starling": {}}, kv_sharing_fast_prefill=True)
    assert any("fast prefill" in reason for reason in star_refusals(config))


def test_speculative_decoding_keeps_star_and_nothing_that_is_not_tried_with_it(model):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    star = {"starling": {"star": {"mode": "auto"}}}
    config = engine_config(model, additional_config=star, speculative_config=speculative)
    assert star_refusals(config) == []
    assert any("speculative decoding" in reason for reason in block_positions_refusals(config))
    assert "speculative decoding" in reuse_refusal(config)


NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "layers_block_type": ["mamba", "attention"],
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
}
"""Of the only architecture for which vLLM takes --use-replayssm. There are no weights: no engine is started."""


def test_beside_replayssm_a_server_starts_with_star_off_and_refuses_it(tmp_path):
    """Its per-row positions come with the metadata of every layer, and virtual_metadata would end the engine."""
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON_H))

    def config(mode):
        given = {"starling": {"star": {"mode": mode}}}
        return engine_config(tmp_path, skip_tokenizer_init=True, use_replayssm=True, additional_config=given)

    (reason,) = star_refusals(config("off"))
    assert reason.startswith("--use-replayssm")
    with pytest.raises(OptionError, match=r"star='auto' is refused: --use-replayssm: .* Allowed: off"):
        config("auto")


def test_what_sets_a_field_by_row_that_has_no_split_is_refused():
    refused_with = {
        "logits_indices_padded": "fast prefill",
        "encoder_seq_lens": "encoder-decoder",
        "encoder_seq_lens_cpu": "encoder-decoder",
        "dcp_local_seq_lens": "decode context",
        "dcp_local_seq_lens_cpu_upper_bound": "decode context",
        "mm_req_doc_ranges": "prefix-LM",
        "rswa_prefix_lens": "R-SWA",
        "replayssm_decode_base_cpu": "--use-replayssm",
    }
    assert refused_with.keys() == set(ROW_FIELDS_WITHOUT_A_SPLIT)
    assert set(refused_with.values()) <= REFUSED.keys()


def test_the_server_gets_the_middleware_once():
    args = SimpleNamespace(additional_config={"starling": {}}, middleware=["theirs"])
    prepare_server(args)
    prepare_server(args)
    assert args.middleware == ["theirs", *MIDDLEWARE]
    plain = SimpleNamespace(additional_config={}, middleware=[])
    prepare_server(plain)
    assert plain.middleware == []


def live_page_args(**more):
    args = {"additional_config": {"starling": {"live_page": "on"} | more}, "middleware": [], "api_key": None}
    return SimpleNamespace(**args, disable_access_log_for_endpoints="/health")


def test_the_live_page_is_a_middleware_where_it_is_on(monkeypatch):
    monkeypatch.delenv("STARLING_ADMIN_KEY", raising=False)
    args = live_page_args()
    for _ in range(2):
        prepare_server(args)
    assert args.middleware == [*MIDDLEWARE, PAGE_MIDDLEWARE]
    assert inspect.isclass(resolve_obj_by_qualname(PAGE_MIDDLEWARE))
    assert args.disable_access_log_for_endpoints == "/health,/starling/live.json"


def test_clients_that_must_not_learn_of_one_another_do_not_see_the_live_page(monkeypatch):
    monkeypatch.delenv("STARLING_ADMIN_KEY", raising=False)
    args = live_page_args(cache_salt="required")
    with pytest.raises(OptionError, match=r"live_page='on' is refused: with cache_salt=required .*STARLING_ADMIN_KEY"):
        prepare_server(args)
    monkeypatch.setenv("STARLING_ADMIN_KEY", "key")
    prepare_server(args)


def test_no_entry_is_no_activation():
    assert parse_config(None) is None
    assert parse_config({"other": {}}) is None
    assert parse_config({"starling": {}}).star.mode == "off"
    with pytest.raises(OptionError):
        parse_config({"starling": {"star": {"mode": "sometimes"}}})


def drafting(method, **changes):
    return SimpleNamespace(**{"method": method, "enable_adaptive_verification": False} | changes)


def fake_config(**changes):
    """A configuration that no rule refuses, with changes by owner__attribute."""
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
        is_hybrid=False,
        max_model_len=8192,
        enable_sleep_mode=False,
        enable_cumem_allocator=False,
        get_vocab_size=lambda: 320,
    )
    parallel = SimpleNamespace(
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        use_ubatching=False,
        data_parallel_size=1,
        data_parallel_external_lb=False,
        data_parallel_hybrid_lb=False,
        pipeline_parallel_size=1,
        enable_elastic_ep=False,
        enable_fault_tolerance=False,
        data_parallel_backend="mp",
        distributed_executor_backend="mp",
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        speculative_config=None,
        cache_config=SimpleNamespace(
            kv_sharing_fast_prefill=False,
            use_replayssm=False,
            enable_prefix_caching=True,
            num_gpu_blocks=None,
            effective_attention_block_size=None,
        ),
        kv_transfer_config=None,
        aux_output_config=SimpleNamespace(enabled=False),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    for name, value in changes.items():
        owner, _, attribute = name.partition("__") if "__" in name else ("", "", name)
        setattr(getattr(config, owner) if owner else config, attribute, value)
    return config


REFUSED = {
    "does not generate": {"model_config__runner_type": "pooling"},
    "encoder-decoder": {"model_config__is_encoder_decoder": True},
    "MLA": {"model_config__use_mla": True},
    "no full-attention layer": {"model_config__hf_text_config": SimpleNamespace(layer_types=["sliding_attention"])},
    "ALiBi": {"model_config__uses_alibi": True},
    "prefix-LM": {"model_config__is_mm_prefix_lm": True},
    "R-SWA": {"model_config__rswa_window": 64},
    "diffusion": {"model_config__is_diffusion": True},
    "(medusa)": {"speculative_config": drafting("medusa")},
    "adaptive verification": {"speculative_config": drafting("eagle", enable_adaptive_verification=True)},
    "recurrent state for each draft": {"speculative_config": drafting("ngram"), "model_config__is_hybrid": True},
    "decode context": {"parallel_config__decode_context_parallel_size": 2},
    "prefill context": {"parallel_config__prefill_context_parallel_size": 2},
    "dual-batch": {"parallel_config__use_ubatching": True},
    "fast prefill": {"cache_config__kv_sharing_fast_prefill": True},
    "long_prefill_token_threshold=1": {"scheduler_config__long_prefill_token_threshold": 1},
    "LMCacheConnectorV1": {"kv_transfer_config": SimpleNamespace(kv_connector="LMCacheConnectorV1")},
    "FLEX_ATTENTION": {"attention_config__backend": SimpleNamespace(name="FLEX_ATTENTION")},
    "--use-replayssm": {"cache_config__use_replayssm": True},
    "(two kinds of pages)": {"starling_reports": [{"star": None}, {"star": "two kinds of pages"}]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_each_refusal_names_its_reason(reason):
    (refusal,) = star_refusals(fake_config(**REFUSED[reason]))
    assert reason in refusal


def test_every_rule_is_tested_and_supported_engines_are_not_refused():
    assert len(REFUSED) == len(RULES)
    assert star_refusals(fake_config()) == []
    allowed = SimpleNamespace(kv_connector=CONNECTORS[0])
    assert star_refusals(fake_config(kv_transfer_config=allowed)) == []
    assert star_refusals(fake_config(attention_config__backend=SimpleNamespace(name="FLASHINFER"))) == []
    assert star_refusals(fake_config(starling_reports=[{"star": None}])) == []
    assert star_refusals(fake_config(speculative_config=drafting("eagle3"))) == []


FLEX, FLASH = SimpleNamespace(name="FLEX_ATTENTION"), SimpleNamespace(name="FLASH_ATTN")


@pytest.mark.parametrize(
    ("backend", "per_kind", "refused"),
    [
        (FLASH, {"full_attention": FLEX}, True),
        (FLEX, {"full_attention": FLASH}, False),
        (FLASH, {"sliding_window": FLEX}, False),
        (FLEX, {"sliding_window": FLASH}, True),
    ],
)
def test_the_backend_of_full_attention_layers_counts(backend, per_kind, refused):
    given = {"attention_config__backend": backend, "attention_config__backend_per_kind": per_kind}
    assert any("FLEX_ATTENTION" in reason for reason in star_refusals(fake_config(**given))) == refused


@pytest.mark.parametrize(
    ("arguments", "refused"), [({"enable_dbo": True}, True), ({"ubatch_size": 2}, True), ({}, False)]
)
def test_microbatches_are_refused_however_they_are_turned_on(arguments, refused):
    given = fake_config(parallel_config=ParallelConfig(**arguments))
    assert any("--ubatch-size" in reason for reason in star_refusals(given)) == refused


FULL = {
    "additional_config": {},
    "parallel_config__data_parallel_size": 2,
    "model_config__hf_text_config": SimpleNamespace(model_type="llama", layer_types=None),
    "model_config__get_sliding_window": lambda: None,
}

ON_ONE_REPLICA = {
    "depend on one another": {"model_config__hf_text_config": KVShiftLlamaConfig()},
    "prefix caches": {"cache_config__enable_prefix_caching": False},
    "OffloadingConnector": {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")},
    "a server with peers (--star-replica-peers) has one engine (--data-parallel-size 2)": {
        "additional_config": {"starling": {"replicas": {"peers": "a:1"}}}
    },
    "external load balancer": {"parallel_config__data_parallel_external_lb": True},
    "pipeline parallelism": {"parallel_config__pipeline_parallel_size": 2},
    "elastic expert": {"parallel_config__enable_elastic_ep": True},
    "--enable-fault-tolerance": {"parallel_config__enable_fault_tolerance": True},
    "speculative": {"speculative_config": drafting("eagle")},
    "sleep mode": {"model_config__enable_sleep_mode": True},
    "expandable_segments:True": {},
    "VLLM_DP_SIZE": {},
    "not start itself may be on hosts whose network devices are not known (ray)": {
        "parallel_config__data_parallel_backend": "ray"
    },
    "outputs beside tokens": {"aux_output_config__enabled": True},
    "one group of layers, and the engine has other ones (3 groups)": {
        "starling_reports": [{"star": None, "split": "3 groups"}]
    },
    "pip install nixl==1.5.1 (detected CUDA 13 but nixl-cu13 is not installed)": {},
}


@pytest.mark.parametrize("reason", ON_ONE_REPLICA)
def test_the_reason_that_keeps_a_prompt_on_one_replica_is_named(reason, monkeypatch):
    nixl_problem = "detected CUDA 13 but nixl-cu13 is not installed"
    monkeypatch.setattr("engine_ext.refusals.nixl_problem", lambda: nixl_problem if nixl_problem in reason else None)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", reason)
    monkeypatch.setenv("VLLM_DP_SIZE", "2" if reason == "VLLM_DP_SIZE" else "1")
    config = fake_config(**FULL | ON_ONE_REPLICA[reason])
    assert reason in replica_set(config).split_refusal
    assert star_refusals(config) == []


def test_every_rule_about_replicas_is_tested_and_prompts_of_plain_models_are_split():
    assert len(ON_ONE_REPLICA) == len(SPLIT_RULES)
    assert (replica_set(fake_config(**FULL)).size, replica_set(fake_config(**FULL)).split_refusal) == (2, None)
    assert (
        "decode context"
        in replica_set(fake_config(**FULL, parallel_config__decode_context_parallel_size=2)).split_refusal
    )


@pytest.mark.parametrize(
    ("layer_types", "window", "hybrid", "named"),
    [
        (["sliding_attention", "full_attention"], 128, False, "sliding_attention"),
        (["linear_attention", "full_attention"], None, True, "linear_attention"),
        (None, None, True, "hybrid"),
    ],
)
def test_models_whose_blocks_depend_on_one_another_stay_on_one_replica(layer_types, window, hybrid, named):
    model = {
        "model_config__hf_text_config": SimpleNamespace(model_type="some", layer_types=layer_types),
        "model_config__get_sliding_window": lambda: window,
        "model_config__is_hybrid": hybrid,
    }
    assert named in replica_set(fake_config(**FULL | model)).split_refusal


def test_a_diffusion_model_keeps_the_scheduler_that_vllm_has_for_it(model):
    """vLLM takes that scheduler where the server has --diffusion-config, whatever the model."""
    given = {"diffusion_config": {"canvas_length": 8}}
    plain = engine_config(model, **given).scheduler_config.get_scheduler_cls()
    config = engine_config(model, additional_config={"starling": {}}, **given)
    star = config.scheduler_config.get_scheduler_cls()
    assert plain is DiffusionScheduler
    assert issubclass(star, plain) and issubclass(star, StarMixin)


def test_every_scheduler_of_starling_is_one_of_vllm_with_the_mixin_before_it():
    for base, star in SCHEDULERS.items():
        assert resolve_obj_by_qualname(star).__bases__ == (StarMixin, resolve_obj_by_qualname(base))


def test_a_class_that_vllm_has_chosen_and_starling_does_not_know_is_refused():
    with pytest.raises(OptionError, match=r"scheduler_cls='theirs' is refused: vLLM has chosen.*Allowed: vllm.v1.core"):
        star_class("scheduler_cls", "theirs", SCHEDULERS)


def test_an_engine_of_several_replicas_gets_the_star_connector_where_prompts_can_be_split(model):
    several = engine_config(model, additional_config={"starling": {}}, data_parallel_size=2)
    assert several.kv_transfer_config.kv_connector == "StarConnector"
    assert engine_config(model, additional_config={"starling": {}}).kv_transfer_config is None
    off = {"data_parallel_size": 2, "enable_prefix_caching": False}
    assert engine_config(model, additional_config={"starling": {}}, **off).kv_transfer_config is None
    with pytest.raises(ValueError, match="star_replicas=2 is refused: replicas exchange"):
        engine_config(model, additional_config={"starling": {"star": {"replicas": 2}}}, **off)
    with pytest.raises(ValueError, match="star_replicas=3 is refused: this server has 2"):
        engine_config(model, additional_config={"starling": {"star": {"replicas": 3}}}, data_parallel_size=2)


def test_replicas_on_several_hosts_need_an_address(model, monkeypatch):
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    given = {"additional_config": {"starling": {}}, "data_parallel_size": 2}
    assert engine_config(model, **given).kv_transfer_config.kv_connector_extra_config[ONE_HOST]
    given |= {"data_parallel_size_local": 1, "data_parallel_address": "127.0.0.1"}
    with pytest.raises(
        ValueError, match="VLLM_HOST_IP=None is refused: VLLM_HOST_IP is not set, and replicas on several"
    ):
        engine_config(model, **given)
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.77")
    with pytest.raises(ValueError, match=r"no network device of this host has the address 192\.0\.2\.77"):
        engine_config(model, **given)
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    assert not engine_config(model, **given).kv_transfer_config.kv_connector_extra_config[ONE_HOST]
    monkeypatch.delenv("VLLM_HOST_IP")
    given["data_parallel_size_local"] = 0  # a front without replicas of its own
    assert engine_config(model, **given).kv_transfer_config is not None


PEERS = {"starling": {"replicas": {"peers": "a:1"}}}


def server_config(model, **arguments):
    return AsyncEngineArgs(model=str(model), enforce_eager=True, **arguments).create_engine_config()


def test_a_server_with_peers_gets_the_star_connector_and_needs_an_address(model, monkeypatch):
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    with pytest.raises(ValueError, match="VLLM_HOST_IP=None is refused: VLLM_HOST_IP is not set"):
        server_config(model, additional_config=PEERS)
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    config = server_config(model, additional_config=PEERS)
    assert config.kv_transfer_config.kv_connector == "StarConnector"
    assert not config.kv_transfer_config.kv_connector_extra_config[ONE_HOST]
    found = replica_set(config)
    assert (found.size, found.present, found.split_refusal) == (64, 1, None)
    assert "peers (--star-replica-peers) don't know" in found.shards_refusal


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable_prefix_caching": False}, r"starling\.replicas\.peers='a:1' is refused: replicas exchange pages"),
        ({"data_parallel_size": 2}, r"peers='a:1' is refused: a server with peers .* has one engine"),
        (
            {"additional_config": {"starling": {"replicas": {"peers": "a:1"}, "star": {"shards": "on"}}}},
            "star_shards='on' is refused: servers that are peers",
        ),
        (
            {"additional_config": {"starling": {"replicas": {"peers": "a:1"}, "star": {"replicas": 65}}}},
            "star_replicas=65 is refused: this server has 64",
        ),
    ],
)
def test_peers_that_could_never_be_used_are_refused_at_the_start(model, monkeypatch, arguments, reason):
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    with pytest.raises(ValueError, match=reason):
        server_config(model, **{"additional_config": PEERS} | arguments)


def test_only_a_server_with_grpc_has_peers(model):
    with pytest.raises(ValueError, match="only a server has peers"):
        engine_config(model, additional_config=PEERS)
    args = SimpleNamespace(additional_config=PEERS, middleware=[], headless=False)
    with pytest.raises(ValueError, match=r"peers call one another over gRPC.*starling serve --grpc-port"):
        prepare_server(args)
    setattr(args, SERVES_PEERS, True)
    prepare_server(args)


@pytest.mark.parametrize(("executor", "one_host"), [("mp", True), ("uni", True), ("ray", False), (object, False)])
def test_processes_that_another_program_starts_may_be_on_other_hosts(executor, one_host):
    parallel = fake_config(parallel_config__distributed_executor_backend=executor).parallel_config
    parallel.data_parallel_size_local, parallel.nnodes = 1, 1
    assert is_one_host(parallel) == one_host
    parallel.nnodes = 2
    assert not is_one_host(parallel)


def test_expandable_segments_are_those_of_cuda(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "expandable_segments" in replica_set(fake_config(**FULL)).split_refusal
    assert replica_set(fake_config(**CPU)).split_refusal is None


CPU = FULL | {
    "device_config__device_type": "cpu",
    "cache_config__cache_dtype": "auto",
    "cache_config__block_size": 128,
    "scheduler_config__async_scheduling": False,
    "parallel_config___api_process_count": 1,
    "model_config__dtype": torch.float32,
    "model_config__get_head_size": lambda: 64,
    "additional_config": {"starling": {}},
}

WITHOUT_SHARDS = {
    "peers (--star-replica-peers) don't know": {
        "additional_config": {"starling": {"replicas": {"peers": "a:1"}}},
        "parallel_config__data_parallel_size": 1,
    },
    "available on CPU only": {"device_config__device_type": "cuda"},
    "for fp8 would round": {"cache_config__cache_dtype": "fp8_e4m3"},
    "cpu_attention=vllm": {"additional_config": {"starling": {"cpu_attention": "vllm"}}},
    "head sizes": {"model_config__get_head_size": lambda: 80 + 8},
    "(amx)": {"model_config__dtype": torch.bfloat16},
    "--api-server-count": {"parallel_config___api_process_count": 2},
    "async scheduling": {"scheduler_config__async_scheduling": True},
}


@pytest.mark.parametrize("reason", WITHOUT_SHARDS)
def test_the_reason_that_keeps_kv_from_staying_on_its_replica_is_named(reason, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    found = replica_set(fake_config(**CPU | WITHOUT_SHARDS[reason]))
    assert found.split_refusal is None
    assert reason in found.shards_refusal


@pytest.mark.parametrize("star", [{"positions": "block"}, {"shards": "on"}], ids=str)
def test_keys_are_laid_out_for_vectors_where_a_server_needs_that(star, monkeypatch):
    """Then Starling's attention reads them on processors with AMX too."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    changes = {"model_config__dtype": torch.bfloat16, "additional_config": {"starling": {"star": star}}}
    assert replica_set(fake_config(**CPU | changes)).shards_refusal is None


def test_every_rule_about_shards_is_tested_and_a_plain_cpu_has_shards():
    assert len(WITHOUT_SHARDS) == len(SHARD_RULES)
    assert replica_set(fake_config(**CPU)).shards_refusal is None
    uncached = replica_set(fake_config(**CPU | {"cache_config__enable_prefix_caching": False}))
    assert uncached.split_refusal is not None
    assert uncached.shards_refusal is None


def test_over_how_many_replicas_kv_is_divided_by_default(model):
    def num_shards(number: int, **star) -> int:
        given = {"starling": {"star": {"mode": "auto", "min_tokens": 256} | star}}
        # In bfloat16 a processor with AMX has no shards.
        config = engine_config(model, additional_config=given, data_parallel_size=number, dtype="float32")
        return default_num_shards(config)

    assert (num_shards(1), num_shards(3)) == (1, 1)
    assert (num_shards(3, shards="on"), num_shards(3, shards="on", replicas=2)) == (3, 2)
    for refused, number, star in (
        ("this server has one replica", 1, {}),
        ("star_replicas=1 keeps", 2, {"replicas": 1}),
        ("star_overlap_size=", 2, {"overlap_size": 128, "block_size": 256}),
    ):
        with pytest.raises(ValueError, match=rf"star_shards='on' is refused: .*{refused}"):
            num_shards(number, shards="on", **star)


def test_a_model_without_layer_types_is_classified_by_its_window():
    bare = {"model_config__hf_text_config": SimpleNamespace(layer_types=None)}
    assert star_refusals(fake_config(**bare))
    assert star_refusals(fake_config(**bare, model_config__get_sliding_window=lambda: None)) == []
    assert star_refusals(fake_config(model_config__is_attention_free=True))


@pytest.mark.parametrize(
    ("config", "has_full_attention"),
    [
        (FalconH1Config(num_hidden_layers=2), True),  # a Mamba-2 mixer and full attention in each layer
        (Zamba2Config(), True),
        (JambaConfig(), True),
        (Qwen3NextConfig(), True),
        (GraniteMoeHybridConfig(layer_types=["linear_attention"] * 32), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_hybrid_models_with_full_attention_take_star(config, has_full_attention):
    model = {"model_config__hf_text_config": config, "model_config__is_hybrid": True}
    refusals = star_refusals(fake_config(**model, model_config__get_sliding_window=lambda: None))
    assert refusals == ([] if has_full_attention else ["the model has no full-attention layer"])
