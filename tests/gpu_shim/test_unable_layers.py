"""Engines that are started for documents, with layers that can't attend to them: other prompts are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from benchmarks.random_llama import make_random_llama
from tests.gpu_shim.harness import run_gpu_engine
from tests.gpu_shim.test_engines import LIMIT, check_batch, decodes, prompt_of
from tests.parity.harness import TINY, max_gap

pytestmark = pytest.mark.engine

PROFILED = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": 256}
"""Arguments of an engine that captures graphs to learn what they take, before it has a KV cache."""
HEAD_SIZE = TINY["hidden_size"] // TINY["num_attention_heads"]


def with_sinks(folder: Path) -> tuple[Path, torch.nn.Module]:
    """A Granite whose layers are a Llama's with attention sinks, and Transformers' Llama with them as the reference."""
    path = make_random_llama(folder / "tiny", **TINY)
    sinks = torch.linspace(0.5, 3, TINY["num_attention_heads"])
    AttentionInterface.register("with_sinks", eager_attention_forward)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="with_sinks").eval()
    weights = load_file(path / "model.safetensors")
    for number, layer in enumerate(reference.model.layers):
        layer.self_attn.sinks = sinks
        weights[f"model.layers.{number}.self_attn.sinks"] = sinks.clone()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_sinks": True}
    config |= {"attention_multiplier": HEAD_SIZE**-0.5}
    (path / "config.json").write_text(json.dumps(config))
    return path, reference


def test_full_graphs_of_layers_with_attention_sinks_have_vllms_kernels(tmp_path):
    model, reference = with_sinks(tmp_path)
    prompts = [prompt_of(seed, length, 6, prompt_logprobs=True) for seed, length in ((1, 40), (2, 90), (3, 7))]
    result = run_gpu_engine(model, [prompts], star={"star_segments": "auto"})
    for prompt, output in zip(prompts, result["batches"][0], strict=True):
        ids = torch.tensor([prompt["ids"] + output["token_ids"]])
        causal = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        with torch.no_grad():
            logits = reference(ids, attention_mask=causal, use_cache=False).logits[0, :-1]
        wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert max_gap(output["prompt_logprobs"] + output["logprobs"], wanted) <= LIMIT
    assert all(step["replayed"] for step in decodes(result["steps"][0]))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
"""vLLM rotates by the original model's angles where the configuration names no other length of its training."""


def test_a_model_whose_angles_are_not_fixed_serves_prompts_without_documents(tmp_path):
    model = make_random_llama(tmp_path / "dynamic", **TINY, rope_parameters=DYNAMIC)
    reference = make_random_llama(tmp_path / "reference", **TINY)
    prompts = [prompt_of(seed, length, 6, prompt_logprobs=True) for seed, length in ((1, 40), (2, 90))]
    result = run_gpu_engine(model, [prompts], star={"star_segments": "auto"}, **PROFILED)
    check_batch(reference, prompts, result["batches"][0])
    assert all(step["replayed"] for step in decodes(result["steps"][0]))


def test_a_model_whose_angles_are_not_fixed_does_not_start_with_documents_in_all_prompts(tmp_path):
    model = make_random_llama(tmp_path / "dynamic", **TINY, rope_parameters=DYNAMIC)
    with pytest.raises(AssertionError) as failed:
        run_gpu_engine(model, [], star={"star": "on", "star_segments": "auto"}, **PROFILED)
    reason = "layer model.layers.0.self_attn.attn has a DynamicNTKScalingRotaryEmbedding, whose angles may not be"
    assert f"RuntimeError: star_segments=auto is refused: {reason}" in str(failed.value)
