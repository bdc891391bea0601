"""Models with caches of their own: how vLLM gets to know them, their layers and their ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_compat.patching import touches


def register_models(configs: dict[str, Any], models: dict[str, str]) -> None:
    """Let Transformers and vLLM know model families of ours.

    Public on both sides; here because a second call must be no error. vLLM warns when one replaces another.

    Args:
        configs: model_type -> configuration class.
        models: architecture -> "module:Class", imported when such a model is loaded.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for model_type, config in configs.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for architecture, path in models.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)


@touches("vllm.config.compilation.CompilationConfig.static_forward_context")
def register_layer(vllm_config: Any, name: str, layer: Any) -> None:
    """Let the model runner find a layer with a KV cache of its own, and an op find it by its name.

    Layers in vLLM enter themselves here. Goes when there is a public way in.

    Raises:
        ValueError: there is a layer of that name.
    """
    layers = vllm_config.compilation_config.static_forward_context
    if name in layers:
        raise ValueError(f"duplicate layer name: {name}")
    layers[name] = layer


def attention_spec(attention: Any, vllm_config: Any) -> Any:
    """The KV cache spec of an Attention layer as the model runner will see it, its backend's packing included.

    Goes when a backend makes the whole spec, as vLLM plans to.
    """
    return attention.get_attn_backend().customize_spec(attention.get_kv_cache_spec(vllm_config))


@functools.cache
def register_op(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Make ``namespace::op`` of a function that torch.compile must not look into; returns its library.

    By vLLM's own function, whose ops cost less a call than torch.library.custom_op's. The cache keeps the library
    alive, and with it the op. Goes when vLLM exports that function.
    """
    from torch.library import Library
    from vllm.utils.torch_utils import direct_register_custom_op

    namespace, op = name.split("::")
    library = Library(namespace, "FRAGMENT")
    direct_register_custom_op(op, function, fake_impl=fake, target_lib=library)
    return library
