"""Starling's own backends for GPUs: what they tell vLLM that they can't do, and what a layer of them refuses."""

from __future__ import annotations

import inspect

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from starling.attention_backends.paged.paged_backend import TritonBackend, TritonImpl, XformersBackend, XformersImpl

ASKED = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": DeviceCapability(9, 0),
    "attn_type": AttentionType.DECODER,
}
LAYER = {
    "num_heads": 4,
    "head_size": 64,
    "scale": 1.0,
    "num_kv_heads": 2,
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
}
BEYOND = [
    {"has_sink": True},
    {"use_mm_prefix": True},
    {"use_non_causal": True},
    {"use_batch_invariant": True},
    {"use_rswa": True},
    {"attn_type": AttentionType.ENCODER_ONLY},
    {"kv_cache_dtype": "int8_per_token_head"},
]


@pytest.mark.parametrize("changed", BEYOND, ids=str)
def test_vllm_is_told_what_the_kernels_can_not_do(changed):
    """vLLM's Triton backend, whose builder and cache these have, can do all of it."""
    asked = ASKED | changed
    assert not TritonAttentionBackend.validate_configuration(**asked)
    assert TritonBackend.validate_configuration(**asked)
    assert not TritonBackend.validate_configuration(**ASKED)


def test_xformers_limits_are_vllms_to_report():
    reasons = XformersBackend.validate_configuration(**ASKED)
    assert len(reasons) == 1 and ("xformers is not installed" in reasons[0] or "no CUDA device" in reasons[0])
    more = {"head_size": 96, "dtype": torch.float32, "has_sliding_window": True, "kv_cache_dtype": "fp8"}
    assert len(XformersBackend.validate_configuration(**ASKED | more)) == 5


@pytest.mark.parametrize(
    ("impl", "changed", "reason"),
    [
        (TritonImpl, {"alibi_slopes": [0.5] * 4}, "a layer has ALiBi slopes"),
        (TritonImpl, {"chunk_lookback": 1}, "a layer looks back at chunks"),
        (TritonImpl, {"num_heads": 256, "num_kv_heads": 1, "head_size": 256}, "256 query heads a KV head do not fit"),
        (XformersImpl, {"logits_soft_cap": 30.0}, "xformers' paged attention has no softcap"),
    ],
)
def test_a_layer_refuses_what_vllm_does_not_ask_for(impl, changed, reason):
    with pytest.raises(NotImplementedError, match=f"gpu_attention is refused: {reason}.* Allowed for this model: vllm"):
        impl(**LAYER | changed)


def test_a_window_is_a_number_of_keys():
    assert TritonImpl(**LAYER).window is None
    assert TritonImpl(**LAYER | {"sliding_window": 17}).window == 17


def test_vllms_question_has_no_part_that_is_not_known_here():
    """A new part of it may be one that the kernels can't do."""
    known = set(ASKED) | set().union(*BEYOND) | {"has_sliding_window"}
    known |= {"use_kv_connector", "use_pcp", "use_dcp", "use_adaptive_verification"}
    assert set(inspect.signature(TritonBackend.validate_configuration).parameters) <= known
