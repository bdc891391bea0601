"""Layers and ops of Starling's own in vLLM's and torch's tables."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from starling.vllm_compat.models import register_layer, register_op


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
