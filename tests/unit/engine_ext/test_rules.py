"""What star refuses, what keeps a prompt on one replica, and what keeps KV from staying where it is: each by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import FalconH1Config, GraniteMoeHybridConfig, JambaConfig, Qwen3NextConfig, Zamba2Config
from vllm.config import ParallelConfig

from starling.attention_backends.star.metadata import ROW_FIELDS_WITHOUT_A_SPLIT
from starling.attention_backends.star.refusals import CONNECTORS, HEAD_RULES, RULES, heads_refusals, star_refusals
from starling.config.head_scores import HeadScores
from starling.engine_ext.models.configs import KVShiftLlamaConfig
from starling.features.replicas.rules import SHARD_RULES, SPLIT_RULES, replica_set
from tests.unit.engine_ext.configs import CPU, FULL, drafting, fake_config

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


ON_ONE_REPLICA = {
    "depend on one another": {"model_config__hf_text_config": KVShiftLlamaConfig()},
    "prefix caches": {"cache_config__enable_prefix_caching": False},
    "OffloadingConnector": {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")},
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
    monkeypatch.setattr(
        "starling.features.replicas.rules.nixl_problem", lambda: nixl_problem if nixl_problem in reason else None
    )
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


def test_expandable_segments_are_those_of_cuda(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "expandable_segments" in replica_set(fake_config(**FULL)).split_refusal
    assert replica_set(fake_config(**CPU)).split_refusal is None


WITHOUT_SHARDS = {
    "a library may keep what is computed": {
        "kv_transfer_config": SimpleNamespace(kv_connector="LibraryConnector", kv_connector_extra_config={})
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


@pytest.mark.parametrize("star", [{"star_segments": "auto"}, {"star_shards": "on"}], ids=str)
def test_keys_are_laid_out_for_vectors_where_a_server_needs_that(star, monkeypatch):
    """Then Starling's attention reads them on processors with AMX too."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    changes = {"model_config__dtype": torch.bfloat16, "additional_config": {"starling": star}}
    assert replica_set(fake_config(**CPU | changes)).shards_refusal is None


def test_every_rule_about_shards_is_tested_and_a_plain_cpu_has_shards():
    assert len(WITHOUT_SHARDS) == len(SHARD_RULES)
    assert replica_set(fake_config(**CPU)).shards_refusal is None
    uncached = replica_set(fake_config(**CPU | {"cache_config__enable_prefix_caching": False}))
    assert uncached.split_refusal is not None
    assert uncached.shards_refusal is None


HEADS = {"starling": {"star_dense_heads": 0.25}}
GPU = {"device_config__device_type": "cuda", "additional_config": HEADS}
WITHOUT_HEADS = {
    "an Attamba model": {"model_config__hf_text_config": SimpleNamespace(model_type="attamba")},
    "on CPUs and on CUDA devices (xpu)": GPU | {"device_config__device_type": "xpu"},
    "has to be started with --star-heads or --star-dense-heads": GPU | {"additional_config": {"starling": {}}},
    "the server is started with --star-segments": GPU
    | {"additional_config": {"starling": HEADS["starling"] | {"star_segments": "auto"}}},
    "layer 3: it has a scale": {"starling_reports": [{"heads": "layer 3: it has a scale for each head"}]},
    "the engine has other scores": {"starling_reports": [{"heads": None, "heads_order": "another"}]},
}


@pytest.mark.parametrize("reason", WITHOUT_HEADS)
def test_the_reason_that_keeps_heads_from_seeing_other_keys_is_named(reason, monkeypatch):
    monkeypatch.setattr(
        "starling.attention_backends.star.refusals.scores_of", lambda config: HeadScores(scores=[[0.1, 0.2]])
    )
    (found,) = heads_refusals(fake_config(**CPU | WITHOUT_HEADS[reason]))
    assert reason in found


def test_every_rule_about_heads_is_tested_and_both_cpus_and_gpus_run_them(monkeypatch):
    """On CPUs whatever op runs the layers, and on both where the cache is fp8."""
    assert len(WITHOUT_HEADS) == len(HEAD_RULES)
    assert heads_refusals(fake_config(**CPU)) == []
    scores = HeadScores(scores=[[0.1, 0.2]])
    monkeypatch.setattr("starling.attention_backends.star.refusals.scores_of", lambda config: scores)
    for order in (scores.order_digest, None):
        assert heads_refusals(fake_config(**CPU, starling_reports=[{"heads": None, "heads_order": order}])) == []
    others = {"model_config__get_head_size": lambda: 72, "cache_config__cache_dtype": "fp8_e4m3"}
    assert heads_refusals(fake_config(**CPU | GPU | others)) == []
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    others |= {"additional_config": {"starling": {"cpu_attention": "vllm"}}, "model_config__dtype": torch.bfloat16}
    assert heads_refusals(fake_config(**CPU | others)) == []


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
