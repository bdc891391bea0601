"""What `starling doctor` says of memory that vLLM's profile has not seen."""

from __future__ import annotations

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from benchmarks.random_llama import make_random_llama
from starling.engine_ext.start import plugin
from starling.lab.doctor import doctor
from starling.lab.selftest.model import alternating_scores
from tests.parity.harness import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return str(make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY))


@pytest.mark.parametrize(
    ("options", "backend", "says"),
    [
        ({}, "FLASH_ATTN", "star rows take no more"),
        ({}, "FLASHINFER", "the page lists"),
        ({}, None, "the page lists"),
        ({"star_segments": "auto", "star": "on"}, "FLASH_ATTN", "partial results of tokens"),
        ({"star_dense_heads": 0.5}, "FLASHINFER", "a copy of a layer's attention"),
        ({"star_dense_heads": 0.5}, "FLASH_ATTN", "star rows take no more"),
    ],
    ids=["star", "FlashInfer", "vLLM's choice", "documents", "dense heads, FlashInfer", "dense heads"],
)
def test_what_takes_memory_that_vllm_has_not_seen(model, tmp_path, options, backend, says):
    """The configuration of an engine, for another device."""
    if "star_dense_heads" in options:
        scores = tmp_path / "scores.json"
        scores.write_text(alternating_scores(model).model_dump_json())
        options = options | {"star_heads": str(scores)}
    config = EngineArgs(model=model, additional_config={"starling": options}).create_engine_config()
    config.device_config.device_type = "cuda"
    config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
    report = doctor.unprofiled_memory(config)
    assert says in report["why"]
    assert (report["bytes"] == 0) == (says == "star rows take no more")
    assert (doctor.MADE_WITH_THE_WEIGHTS in report["why"]) == ("star_segments" in options)
    assert (doctor.SPLITS_NONE in report["why"]) == (backend != "FLASHINFER"), "no graphs are configured"


def test_partial_results_of_flash_attention_3_are_named_within_graph_size(model):
    """32 splits of a rank's query heads, each with its log-sum-exp, in float32."""
    config = EngineArgs(model=model, additional_config={"starling": {}}).create_engine_config()
    config.device_config.device_type = "cuda"
    config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.max_cudagraph_capture_size = 512
    report = doctor.unprofiled_memory(config)
    heads, size = TINY["num_attention_heads"], TINY["hidden_size"] // TINY["num_attention_heads"]
    assert f"{32 * 512 * heads * (size + 1) * 4:,} for the keys" in report["why"]
    assert report["bytes"] == 0, "plain vLLM has them too"
