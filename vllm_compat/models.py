"""Models: those with caches of their own, their layers and ops, and the rotary layers of any model."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from starling.vllm_compat.patching import Original, touches, wrap


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
    """Return the KV cache spec of an Attention layer as the model runner will see it, its backend's packing included.

    Goes when a backend makes the whole spec, as vLLM plans to.
    """
    return attention.get_attn_backend().customize_spec(attention.get_kv_cache_spec(vllm_config))


@touches("vllm.v1.kv_cache_interface.MambaSpec.{num_prefill_checkpoint_blocks, prefill_checkpoint_alignment}")
def without_prefill_checkpoints(specs: dict[str, Any]) -> dict[str, Any]:
    """Return a CPU worker's KV cache specs, changed so that layers with a state keep it at the ends of chunks only.

    With prefix caching, vLLM keeps the state of a Mamba-2 layer at the last whole page of a prompt without ending a
    chunk there. Its CPU op returns no such state, and a Triton kernel would store it: a CPU engine ends with the first
    prompt of more than a page. Without these checkpoints vLLM ends a chunk at that page, as it does for gated delta
    nets. Goes when a CPU engine of plain vLLM serves a Mamba-2 hybrid with prefix caching.
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    def without(spec: Any) -> Any:
        if not isinstance(spec, MambaSpec):
            return spec
        return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)

    return {name: without(spec) for name, spec in specs.items()}


@functools.cache
def register_op(name: str, function: Callable[..., None], mutates: tuple[str, ...]) -> Any:
    """Make ``namespace::op`` of a function that torch.compile must not look into; returns its library.

    The function returns nothing, and writes its outputs to the arguments named in ``mutates``. The caller makes them,
    because the op splits compiled graphs: the CUDA graph of the piece after it reads the outputs at the addresses of
    its capture, and a tensor that the op itself made would lie elsewhere in each step. Breakable CUDA graphs break at
    the op.

    By vLLM's own function, whose ops cost less a call than torch.library.custom_op's. The cache keeps the library
    alive, and with it the op. Goes when vLLM exports that function.
    """
    from torch.library import Library
    from vllm.utils.torch_utils import direct_register_custom_op

    def run(*args: Any) -> None:
        break_point(function)(*args)

    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    namespace, op = name.split("::")
    library = Library(namespace, "FRAGMENT")
    direct_register_custom_op(op, run, mutates_args=list(mutates), fake_impl=lambda *_: None, target_lib=library)
    return library


@functools.cache
def break_point(function: Callable[..., None]) -> Callable[..., None]:
    """Return an op's function as a break point of breakable CUDA graphs, like vLLM's attention ops.

    The V1 runner captures these graphs without metadata, so a captured op would never read its cache. vLLM 0.32 decides
    at the call of ``eager_break_during_capture`` whether breakable graphs are on. VllmConfig may turn them on after the
    import of a model's module, so the call is made in the first forward. That goes with vLLM 0.32, which is the last to
    decide so early, and the rest when an op can ask for it.
    """
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    return eager_break_during_capture(function)


def on_weights_loaded(callback: Callable[[Any], None]) -> None:
    """Call ``callback(model)`` when a model has its weights, before vLLM brings them into the form that its ops take.

    On CPU nothing is left of most weights afterwards. Loaders that load a model in a way of their own don't call it.
    Goes when vLLM names the weights that it has loaded.
    """
    from vllm.model_executor.model_loader import base_loader

    @wrap(base_loader, "process_weights_after_loading")
    def process_weights_after_loading(original: Original, model: Any, *args: Any, **kwargs: Any) -> Any:
        callback(model)
        return original(model, *args, **kwargs)


FIXED_FREQUENCIES = (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
"""The rotary embeddings that rotate by the same angle at each step, at any position and length."""


class _Seen(Exception):
    """Ends a forward pass at its attention."""


@contextlib.contextmanager
@touches("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA.base_layer")
def without_adapters(module: Any) -> Iterator[None]:
    """Run a module's layers without LoRA, which needs a batch, for the duration of the block.

    Goes with AttentionBlock.
    """
    layers = {name: layer for name, layer in module.named_children() if hasattr(layer, "base_layer")}
    try:
        for name, layer in layers.items():
            setattr(module, name, layer.base_layer)
        yield
    finally:
        for name, layer in layers.items():
            setattr(module, name, layer)


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One attention layer of a loaded model, and what its model has around it.

    Attributes:
        attention: vLLM's layer, which attends over the KV cache.
        module: the model's module that has it, from hidden states to hidden states.
    """

    attention: Any
    module: Any

    @property
    def rotary(self) -> Any | None:
        """Return the rotary embedding, which vLLM's models keep beside the attention layer, or None if it has none."""
        return getattr(self.module, "rotary_emb", None)

    def queries_and_keys(self, positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (T, heads, head size) queries and keys with which the attention is called for T tokens.

        Args:
            positions: (T,) int64.
            hidden: (T, hidden size).

        Raises:
            RuntimeError: the attention is not called, or not with the queries and keys first.
        """
        found: list[torch.Tensor] = []

        def see(module: Any, args: Any) -> None:
            found.extend(args[:2])
            raise _Seen

        handle = self.attention.register_forward_pre_hook(see)
        try:
            with without_adapters(self.module):
                self.module(positions=positions, hidden_states=hidden)
        except _Seen:
            pass
        finally:
            handle.remove()
        if len(found) != 2:
            raise RuntimeError("the attention is not called with queries and keys")
        query, key = (part.reshape(len(positions), -1, self.attention.head_size) for part in found)
        return query, key


@touches("vllm.model_executor.layers.attention.Attention.layer_name")
def attention_blocks(model: torch.nn.Module) -> dict[str, AttentionBlock]:
    """Return layer name -> its block, for the attention layers of a loaded model.

    Goes when vLLM's layers know their rotary embedding.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, Attention)]
    found = (AttentionBlock(modules[name], modules[name.rpartition(".")[0]]) for name in names)
    return {block.attention.layer_name: block for block in found}


@touches("vllm.model_executor.layers.rotary_embedding.RotaryEmbedding._compute_cos_sin_cache")
def angle_table(rotary: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, (num_positions, rotary dimensions / 2) float32, of the angles of each position.

    ``rotary`` holds them in the model's dtype, and YaRN's are scaled. Goes when vLLM has them in float32.
    """
    cos, sin = rotary._compute_cos_sin_cache()[:num_positions].float().to(rotary.cos_sin_cache.device).chunk(2, -1)
    length = torch.hypot(cos, sin)
    return cos / length, sin / length
