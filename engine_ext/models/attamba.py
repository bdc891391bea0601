"""Attamba for vLLM: vLLM's own layers around the attention of attention_backends/attamba/.

K and V are the layer's input plus the output of a state space mixer each, so no K and V projection exists to split over
tensor-parallel ranks. Each rank runs the whole mixers. Only their output projection, the queries and `wo` are split by
heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs

from starling.attention_backends.attamba.attamba_backend import AttambaMetadata
from starling.attention_backends.attamba.attend_step import Cache, Sizes, attend
from starling.attention_backends.attamba.cache import KvPages, PagedRows, layer_specs
from starling.attention_backends.attamba.chunks import ChunkPlan, layer_offset, profiled_tokens
from starling.attention_backends.attamba.mix import GROUP_ROWS, mix
from starling.attention_backends.attamba.mixer import MixerParameters
from starling.engine_ext.models.configs import AttambaConfig
from starling.vllm_compat.config import split_graph_at
from starling.vllm_compat.models import register_layer, register_op

OP = "starling::attamba"


class Mixers(nn.Module):
    """The mixers SSM_k and SSM_v: Mamba-2 on one input, within each chunk. Their outputs are split over ranks."""

    def __init__(self, config: AttambaConfig, prefix: str) -> None:
        super().__init__()
        self.sizes, self.eps = config.mixer_sizes, config.rms_norm_eps
        sizes, dim = self.sizes, config.hidden_size
        self.in_proj = MergedColumnParallelLinear(
            dim, [sizes.inner + sizes.width] * sizes.count, bias=False, prefix=f"{prefix}.in_proj", disable_tp=True
        )
        self.conv_weight = mixer_parameter(sizes.count, sizes.taps, sizes.channels, transposed=True)
        self.A_log, self.D = (mixer_parameter(sizes.count, sizes.heads) for _ in range(2))
        self.norm_weight = mixer_parameter(sizes.count, sizes.inner)
        self.out_proj = nn.ModuleList(
            ColumnParallelLinear(sizes.inner, dim, bias=False, prefix=f"{prefix}.out_proj.{index}")
            for index in range(sizes.count)
        )

    def forward(
        self, projected: torch.Tensor, pages: torch.Tensor, block_table: torch.Tensor, plan: ChunkPlan
    ) -> tuple[torch.Tensor, ...]:
        """Return the output of each mixer, (T, local dim).

        Args:
            projected: (T, mixers x [gate | u B C | dt]), the output of ``in_proj``.
            pages: (num_pages, rows, mixers x [u B C | dt]), the cache of rows.
            block_table: (R, columns) int32, block table of that cache.
            plan: chunk plan of the layer.
        """
        return self.project(mix(projected, pages, block_table, plan, self.constants, self.sizes, self.eps))

    def decode(
        self,
        projected: torch.Tensor,
        pages: torch.Tensor,
        step: AttambaMetadata,
        chunk_size: int,
        offset: int,
    ) -> tuple[torch.Tensor, ...]:
        """Return the output of ``forward`` for a step that decodes on a GPU; see ``decode.mix_decode``."""
        from starling.attention_backends.attamba.decode import mix_decode  # imports Triton

        y = mix_decode(projected, pages, step, chunk_size, offset, self.constants, self.sizes, self.eps)
        return self.project(y)

    def project(self, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Apply the output projections to (mixers, T, inner)."""
        return tuple(linear(part)[0] for linear, part in zip(self.out_proj, mixed, strict=True))

    @property
    def constants(self) -> MixerParameters:
        return MixerParameters(self.conv_weight, self.A_log, self.D, self.norm_weight)


def mixer_parameter(*shape: int, transposed: bool = False) -> nn.Parameter:
    """Make a float32 parameter with the mixer as its first dimension; ``transposed`` reverses the others when loading.

    Its loader raises ValueError for a tensor of another shape.
    """
    parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)

    def load(param: nn.Parameter, tensor: torch.Tensor, mixer: int) -> None:  # named so by vLLM, in a reload
        expected = shape[:0:-1] if transposed else shape[1:]
        if tensor.shape != expected:
            raise ValueError(f"the parameter has shape {expected}")
        param.data[mixer].copy_(tensor.T if transposed else tensor)

    set_weight_attrs(parameter, {"weight_loader": load})
    return parameter


@functools.lru_cache(maxsize=4)
def angle_tables(
    head_dim: int, positions: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (positions, head_dim / 2) float32 of the rotary embedding, made once for all layers.

    The angles are computed in float64. In float32 they are off by 1e-3 at 32k tokens: too much for sharp scores.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), theta**-exponents)
    return angles.cos().float(), angles.sin().float()


class AttentiveSsm(nn.Module):
    """Attention of one layer, with its mixers and its three caches.

    Args:
        config: configuration of the model.
        layer: index of the layer.
        dtype: dtype of the model and its caches.
        positions: tokens of the longest request, for which the rotary embedding has angles.
        prefix: name of the layer's attention.

    Raises:
        ValueError: the ranks do not divide the heads, or the caches do not support a size.
    """

    def __init__(self, config: AttambaConfig, layer: int, dtype: torch.dtype, positions: int, prefix: str) -> None:
        super().__init__()
        self.ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if config.num_attention_heads % self.ranks:
            reason = f"the ranks do not divide the {config.num_attention_heads} attention heads"
            raise ValueError(f"tensor_parallel_size={self.ranks} is refused: {reason}")
        self.heads = config.num_attention_heads // self.ranks
        self.local_dim = self.heads * config.head_dim
        self.offset = layer_offset(layer, config.num_hidden_layers, config.token_chunk)
        self.attention = Sizes(config.token_chunk, config.leading_tokens + 1, config.head_dim**-0.5)
        specs = layer_specs(config, dtype, self.ranks)
        self.states, self.window, self.rows = (
            PagedRows(specs[name], f"{prefix}.{name}") for name in ("states", "window", "rows")
        )
        self.mixers = Mixers(config, f"{prefix}.mixers")
        dim = config.hidden_size
        self.wq = ColumnParallelLinear(dim, dim, bias=False, prefix=f"{prefix}.wq")
        self.wo = RowParallelLinear(dim, dim, bias=False, prefix=f"{prefix}.wo")
        self.rope = config.head_dim, positions, config.rope_theta
        self.name = prefix
        register_layer(get_current_vllm_config(), prefix, self)
        split_graph_at(get_current_vllm_config(), OP)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (T, dim) for the normed inputs x (T, dim)."""
        query, projected = self.wq(x)[0], self.mixers.in_proj(x)[0]
        out = torch.empty_like(query)
        torch.ops.starling.attamba(x, query, projected, out, self.name)
        return self.wo(out)[0]

    def attend(self, x: torch.Tensor, query: torch.Tensor, projected: torch.Tensor, out: torch.Tensor) -> None:
        """Mix the tokens' chunks, store what the caches keep, and attend.

        Args:
            x: (T, dim), normed inputs. They may have padding after the step's tokens.
            query: (T, local dim), before the rotary embedding.
            projected: (T, mixers x [gate | u B C | dt]).
            out: (T, local dim) to write to; 0 for padding.
        """
        metadata: Any = get_forward_context().attn_metadata
        caches = (self.states, self.window, self.rows)
        angles = angle_tables(*self.rope, x.device)
        if metadata is None:  # a run without requests, such as vLLM's memory profiling
            states, window, rows = self.profiling_metadata(x)
            assert states.tokens is not None
            zeros = torch.zeros(int(states.tokens.position.max()) + 1, angles[0].shape[1], device=x.device)
            angles = zeros, zeros
            states_page, window_page, pages = (cache.scratch_page(x.device) for cache in caches)
            states_kv, window_kv = (KvPages(page, self.heads) for page in (states_page, window_page))
        else:
            states, window, rows = (metadata[cache.prefix] for cache in caches)
            states_kv, window_kv = (cache.views(self.kv_pages) for cache in (self.states, self.window))
            pages = self.rows.views(lambda pages: pages)
        count, sizes = states.num_tokens, self.attention
        query, projected = query[:count], projected[:count]
        own = x[:count, self.rank * self.local_dim : (self.rank + 1) * self.local_dim]
        kept = Cache(states_kv, states), Cache(window_kv, window)
        out[count:] = 0
        if states.decodes:
            from starling.attention_backends.attamba.decode import attend_decode  # imports Triton

            mixed = self.mixers.decode(projected, pages, rows, sizes.chunk, self.offset)
            attend_decode(query, mixed, own, angles, *kept, self.offset, sizes, out[:count])
            return
        plan = states.plan(sizes.chunk, self.offset, sizes.window - 1)
        mixed = self.mixers(projected, pages, rows.block_table, plan)
        out[:count] = attend(query, mixed, own, angles, *kept, plan, sizes)

    def kv_pages(self, pages: torch.Tensor) -> KvPages:
        """Return views of K and V of pages (num_pages, 17, 2 x local dim)."""
        return KvPages(pages, self.heads)

    def profiling_metadata(self, x: torch.Tensor) -> Iterator[AttambaMetadata]:
        """Return metadata of the states, window and rows for a run of tokens x (T, dim) that belong to no request.

        vLLM sizes the KV cache by the peak memory of this run, so the run does as much as a step of T tokens does at
        most.
        """
        sizes = self.attention
        tokens = profiled_tokens(len(x), sizes.chunk, self.offset, sizes.window - 1, GROUP_ROWS)
        caches = (self.states, self.window, self.rows)
        return (AttambaMetadata.on_one_page(tokens, cache.spec, x.device) for cache in caches)


def _attend(x: torch.Tensor, query: torch.Tensor, projected: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    """Call ``AttentiveSsm.attend`` of the layer of that name.

    It writes to the layer's caches without declaring them as mutated, as vLLM's attention ops do: nothing else in a
    compiled graph reads them.
    """
    layer: Any = get_forward_context().no_compile_layers[layer_name]
    layer.attend(x, query, projected, out)


register_op(OP, _attend, mutates=("out",))


class AttambaLayer(nn.Module):
    """One layer: attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, config: AttambaConfig, layer: int, dtype: torch.dtype, positions: int, prefix: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attentive_ssm = AttentiveSsm(config, layer, dtype, positions, f"{prefix}.attentive_ssm")
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = LlamaMLP(
            config.hidden_size, config.intermediate_size, "silu", prefix=f"{prefix}.feed_forward"
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output (T, dim) for hidden states (T, dim)."""
        hidden = hidden + self.attentive_ssm(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.ffn_norm(hidden))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class AttambaForCausalLM(nn.Module):
    """Attamba model. ``load_checkpoint`` maps the names of the checkpoint to the parameters.

    vLLM compiles the code between the attention of two layers, and captures it in piecewise CUDA graphs. The host plans
    the attention of a step from the lengths of the batch, so the attention runs between the graphs. A step that decodes
    has no plan on GPUs, and is one full CUDA graph.

    Raises:
        ValueError: the caches do not support the configuration, or the model does not support a feature of vLLM.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse_features(vllm_config)
        config: AttambaConfig = vllm_config.model_config.hf_config
        self.config = config
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "resolved by vLLM"
        positions = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
        self.tok_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            AttambaLayer(config, layer, dtype, positions, maybe_prefix(prefix, f"layers.{layer}"))
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "output"))
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the normed hidden states (T, dim) of the T tokens of a step."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.output, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint (raises ValueError, see ``load_checkpoint``)."""
        return load_checkpoint(self, weights)


def refuse_features(vllm_config: VllmConfig) -> None:
    """Check a VllmConfig for features with which the model would be silently wrong, or would fail late.

    Raises:
        ValueError: one of these features is on; the message names it.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    refused = {
        f"kv_cache_dtype={cache.cache_dtype}": (
            cache.cache_dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")),
            "the caches have the model's dtype",
        ),
        "speculative decoding": (
            vllm_config.speculative_config is not None,
            "the plan of a step assumes that all its tokens are kept",
        ),
        f"quantization={vllm_config.model_config.quantization}": (
            vllm_config.quant_config is not None,
            "no quantised checkpoint exists",
        ),
        "decode context parallelism": (parallel.decode_context_parallel_size > 1, "the caches are not split by tokens"),
        "prefill context parallelism": (parallel.prefill_context_parallel_size > 1, "chunks are not split over ranks"),
        "dual-batch overlap (enable_dbo or ubatch_size)": (
            parallel.use_ubatching,
            "the plan of a step is for the whole batch",
        ),
        f"VLLM_BATCH_INVARIANT={envs.VLLM_BATCH_INVARIANT}": (
            envs.VLLM_BATCH_INVARIANT,
            "the number of parts in which the kernels attend to a token's keys depends on the batch",
        ),
        "disable_hybrid_kv_cache_manager": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "each of the three caches needs its own KV cache group",
        ),
    }
    for feature, (is_on, reason) in refused.items():
        if is_on:
            raise ValueError(f"{feature} is refused with an Attamba model: {reason}")


MIXERS = ("k_ssm", "v_ssm")
PAIRED = (".gate_up_proj.", ".mixers.in_proj.", ".conv_weight", ".A_log", ".D", ".norm_weight")
"""Parts of the names of parameters that consist of two shards."""


def target_shard(name: str) -> tuple[str, Any]:
    """Return the parameter that a checkpoint's tensor is loaded into, and its shard (None for the whole parameter)."""
    for index, mixer in enumerate(MIXERS):
        if f".{mixer}." in name:
            name = name.replace(f".{mixer}.", ".attentive_ssm.mixers.").replace(".ssm_norm.weight", ".norm_weight")
            if name.endswith(".out_proj.weight"):
                return name.replace(".out_proj.", f".out_proj.{index}."), None
            return name, index
    for part, shard in ((".w1.", 0), (".w3.", 1)):
        if part in name:
            return name.replace(part, ".gate_up_proj."), shard
    return name.replace(".w2.", ".down_proj."), None


def load_checkpoint(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load all tensors of a checkpoint and return the names of the loaded parameters.

    Args:
        model: the served model.
        weights: (name, tensor) pairs of the checkpoint.

    Raises:
        ValueError: a tensor is unknown or has the wrong shape, or parameters lack tensors; the message names them.
    """
    parameters = dict(model.named_parameters())
    loaded: set[tuple[str, Any]] = set()
    for name, tensor in weights:
        target, shard = target_shard(name)
        if target not in parameters:
            raise ValueError(f"{name} is refused: an Attamba checkpoint has no tensor of that name")
        parameter = parameters[target]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        try:
            loader(parameter, tensor, *(() if shard is None else (shard,)))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not fit config.json: {error}") from error
        loaded.add((target, shard))
    expected = {
        (name, shard) for name in parameters for shard in ((0, 1) if any(p in name for p in PAIRED) else (None,))
    }
    if missing := sorted(name for name, _ in expected - loaded):
        raise ValueError(f"the checkpoint lacks tensors of {len(missing)} parameters: {', '.join(missing[:8])}")
    return {name for name, _ in loaded}
