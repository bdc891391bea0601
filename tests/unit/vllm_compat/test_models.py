"""Layers and ops of Starling's own in vLLM's and torch's tables, and the specs of vLLM's layers."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from starling.vllm_compat.models import register_layer, register_op, without_prefill_checkpoints


def test_a_layer_is_registered_once():
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    layer = object()
    register_layer(config, "model.layers.0.state", layer)
    assert config.compilation_config.static_forward_context == {"model.layers.0.state": layer}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.state"):
        register_layer(config, "model.layers.0.state", layer)


def test_an_op_runs_and_is_made_once():
    def double(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(2 * x)

    register = partial(register_op, "starling::test_double", double, mutates=("out",))
    assert register() is register()
    out = torch.zeros(2)
    torch.ops.starling.test_double(torch.ones(2), out)
    assert out.tolist() == [2, 2]


def test_layers_with_a_state_keep_it_at_the_ends_of_chunks_only():
    """On CPU. vLLM's own specs of Mamba-2 layers have checkpoints within a chunk."""
    assert "num_prefill_checkpoint_blocks=1" in inspect.getsource(MambaMixer2.get_kv_cache_spec), "it is not needed"
    state = MambaSpec(
        block_size=32,
        shapes=((1,),),
        dtypes=(torch.float32,),
        num_prefill_checkpoint_blocks=1,
        prefill_checkpoint_alignment=1,
    )
    keys = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    specs = without_prefill_checkpoints({"mixer": state, "attention": keys})
    assert specs["attention"] is keys
    assert (specs["mixer"].num_prefill_checkpoint_blocks, specs["mixer"].prefill_checkpoint_alignment) == (0, None)
    assert specs["mixer"].shapes == state.shapes
