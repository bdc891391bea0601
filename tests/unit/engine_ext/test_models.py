"""The model families: configurations, the tensors of a checkpoint, registration."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig

from benchmarks.kv_shift.random_model import TINY_BAICHUAN, TINY_LLAMA, make_random_kv_shift
from starling.engine_ext.models import kv_shift
from starling.engine_ext.models.configs import MODELS, BaichuanM1Config, KVShiftLlamaConfig, register_model_families
from starling.engine_ext.models.kv_shift import checked_weights, kv_heads_of_rank

LLAMA = kv_shift.llama_tensors(KVShiftLlamaConfig(**TINY_LLAMA))


def tensors_of(shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_registration_twice_is_no_error_and_loads_no_model():
    """Runs in a separate process, because other tests import the models."""
    code = """
        import sys
        from starling.engine_ext.start.plugin import register
        register()
        register.__wrapped__()
        from vllm import ModelRegistry
        known = ModelRegistry.get_supported_archs()
        print([name in known for name in ("KVShiftLlamaForCausalLM", "BaichuanM1ForCausalLM")])
        heavy = ("starling.attention_backends.kv_shift.state", "vllm.v1.worker.gpu_worker")
        print([name for name in sys.modules if name in heavy])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-2:] == ["[True, True]", "[]"], done.stderr


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_BAICHUAN], ids=["llama", "baichuan"])
def test_a_checkpoint_is_read_as_its_family(config, tmp_path):
    register_model_families()
    read = AutoConfig.from_pretrained(make_random_kv_shift(tmp_path, config))
    assert read.model_type == config["model_type"] and read.architectures[0] in MODELS
    assert read.rope_parameters["rope_theta"] == config["rope_theta"]


def test_baichuan_layers_have_their_own_numbers_of_heads():
    config = BaichuanM1Config(**TINY_BAICHUAN)
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2
    heads = [
        (own.num_attention_heads, own.num_key_value_heads, own.head_dim) for own in map(config.layer_config, (0, 1))
    ]
    assert heads == [(4, 2, 32), (2, 2, 64)]
    shapes = kv_shift.baichuan_tensors(config)
    assert shapes["model.layers.0.self_attn.W_pack.weight"] == (4 * 32 + 2 * 2 * 32, 128)
    assert shapes["model.layers.1.self_attn.W_pack.weight"] == (2 * 64 + 2 * 2 * 64, 128)


@pytest.mark.parametrize("wrong", [{"conv_window": 3}, {"sliding_window": None}], ids=str)
def test_an_unsupported_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BaichuanM1Config(**TINY_BAICHUAN | wrong)


def test_a_complete_checkpoint_passes_unchanged():
    tensors = tensors_of(LLAMA) | {"unknown": torch.zeros(1)}
    assert dict(checked_weights(tensors.items(), LLAMA, quantized=False)).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.conv_v"])
def test_a_missing_tensor_is_named(name):
    tensors = tensors_of({other: shape for other, shape in LLAMA.items() if other != name})
    with pytest.raises(ValueError, match=rf"lacks {name} \("):
        list(checked_weights(tensors.items(), LLAMA, quantized=False))


def test_an_update_of_a_loaded_model_may_lack_tensors():
    update = {"model.norm.weight": torch.zeros(128)}
    assert list(checked_weights(update.items(), LLAMA, quantized=False, update=True)) == list(update.items())
    with pytest.raises(ValueError, match=r"model\.norm"):
        list(checked_weights([("model.norm.weight", torch.zeros(2))], LLAMA, quantized=False, update=True))


def test_a_misshapen_tensor_is_named():
    tensors = tensors_of(LLAMA) | {"model.layers.1.self_attn.conv_k": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.conv_k has shape \(2, 2\).*\(1, 1, 2, 1, 2\)"):
        list(checked_weights(tensors.items(), LLAMA, quantized=False))


def test_shapes_of_quantised_linear_layers_are_not_checked():
    tensors = {name: tensor for name, tensor in tensors_of(LLAMA).items() if "proj" not in name}
    list(checked_weights(tensors.items(), LLAMA, quantized=True))
    del tensors["model.layers.1.self_attn.conv_k"]
    with pytest.raises(ValueError, match="conv_k"):
        list(checked_weights(tensors.items(), LLAMA, quantized=True))


def test_the_head_is_normalised_unless_quantised():
    torch.manual_seed(0)
    head = torch.randn(5, 8)
    ((_, normalised),) = kv_shift.mapped_weights([("lm_head.weight", head)])
    torch.testing.assert_close(normalised.norm(dim=-1), torch.ones(5))
    quantised = head.to(torch.float8_e4m3fn)
    ((_, kept),) = kv_shift.mapped_weights([("lm_head.weight", quantised)])
    assert kept is quantised


@pytest.mark.parametrize(
    ("heads", "ranks", "held"),
    [
        (4, 2, [(0, 2), (2, 4)]),
        (2, 2, [(0, 1), (1, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1)] * 2),
    ],
)
def test_ranks_hold_the_heads_that_qkv_parallel_linear_assigns(heads, ranks, held):
    slices = [kv_heads_of_rank(heads, rank, ranks) for rank in range(ranks)]
    assert [(part.start, part.stop) for part in slices] == held
