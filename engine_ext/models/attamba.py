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
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs

from attention_backends.attamba.attend import attend
from attention_backends.attamba.backend import AttambaMetadata
from attention_backends.attamba.cache import PagedRows, cache_specs
from attention_backends.attamba.chunks import ChunkPlan, layer_offset, profiled_tokens
from attention_backends.attamba.mixer import MixerSizes
from attention_backends.attamba.pages import KvPages
from attention_backends.attamba.scan import chunk_scan
from engine_ext.models.attamba_config import AttambaConfig
from engine_ext.models.attamba_weights import MIXERS, load_checkpoint
from vllm_compat.rotary import ExactRotaryEmbedding

GROUP_ROWS = 2048
"""Rows of chunks that a layer's mixers process at once. The limit bounds the memory of a step: a step with a token in
each of many chunks has many more rows than tokens."""


class Mixers(nn.Module):
    """SSM_k and SSM_v: Mamba-2 mixers of one input, within each chunk. Their outputs are split over ranks."""

    def __init__(self, config: AttambaConfig, prefix: str) -> None:
        super().__init__()
        self.sizes = MixerSizes(config.ssm_heads, config.ssm_inner, config.ssm_state_dim, config.conv_size)
        self.eps = config.rms_norm_eps
        dim, inner, heads, count = config.hidden_size, config.ssm_inner, config.ssm_heads, len(MIXERS)
        convolved = inner + 2 * config.ssm_state_dim
        # in_proj is split in two: the gate is computed only for tokens of the step, the rest for whole chunks.
        self.gate, self.inputs = (
            MergedColumnParallelLinear(dim, [width] * count, bias=False, prefix=f"{prefix}.{name}", disable_tp=True)
            for name, width in (("gate", inner), ("inputs", convolved + heads))
        )
        self.conv_weight = mixer_parameter(count, convolved, config.conv_size)
        self.A_log, self.D = (mixer_parameter(count, heads, dtype=torch.float32) for _ in range(2))
        self.norm_weight = mixer_parameter(count, inner)
        self.out_proj = nn.ModuleList(
            ColumnParallelLinear(inner, dim, bias=False, prefix=f"{prefix}.out_proj.{index}") for index in range(count)
        )

    def forward(
        self, x: torch.Tensor, chunks: torch.Tensor, chunk_index: torch.Tensor, index_in_chunk: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The output of each mixer, (T, local dim).

        Args:
            x: (T, dim), inputs of the tokens of the step.
            chunks: (N, W, dim), inputs of each chunk from its first token on.
            chunk_index, index_in_chunk: (T,) int64, see ``chunk_scan``.
        """
        projected = self.inputs(chunks)[0].unflatten(-1, (len(MIXERS), -1))
        y = chunk_scan(projected, self.conv_weight, self.A_log, self.D, self.sizes, chunk_index, index_in_chunk)
        del projected  # the largest tensor of long chunks with few tokens in the step
        gate = self.gate(x)[0].unflatten(-1, (len(MIXERS), -1))
        y = nn.functional.rms_norm(y * nn.functional.silu(gate.float()), y.shape[-1:], eps=self.eps) * self.norm_weight
        return (linear(part)[0] for linear, part in zip(self.out_proj, y.to(x.dtype).unbind(1), strict=True))


def mixer_parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter whose first dimension is the mixer. Its loader raises ValueError for a tensor of another shape."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def load(parameter: nn.Parameter, tensor: torch.Tensor, mixer: int) -> None:
        if tensor.shape != parameter.shape[1:]:
            raise ValueError(f"the parameter has shape {tuple(parameter.shape[1:])}")
        parameter.data[mixer].copy_(tensor)

    set_weight_attrs(parameter, {"weight_loader": load})
    return parameter


@functools.cache
def rotary(head_dim: int, positions: int, theta: float, dtype: torch.dtype) -> ExactRotaryEmbedding:
    """The rotary embedding of all layers; it rotates the pairs (2 j, 2 j + 1)."""
    return ExactRotaryEmbedding(head_dim, head_dim, positions, theta, False, dtype)


class AttentiveSsm(nn.Module):
    """The attention of one layer, with its mixers and its three caches.

    Raises:
        ValueError: the ranks do not divide the heads, or the caches do not support a size.
    """

    def __init__(self, config: AttambaConfig, layer: int, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if config.num_attention_heads % self.ranks:
            reason = f"the ranks do not divide the {config.num_attention_heads} attention heads"
            raise ValueError(f"tensor_parallel_size={self.ranks} is refused: {reason}")
        self.heads = config.num_attention_heads // self.ranks
        self.head_dim, self.local_dim = config.head_dim, self.heads * config.head_dim
        self.chunk_size, self.leading_tokens = config.token_chunk, config.leading_tokens
        self.offset = layer_offset(layer, config.num_hidden_layers, self.chunk_size)
        specs = cache_specs(self.chunk_size, self.leading_tokens, config.hidden_size, self.local_dim, dtype)
        self.states, self.window, self.rows = (
            PagedRows(specs[name], f"{prefix}.{name}") for name in ("states", "window", "rows")
        )
        self.mixers = Mixers(config, f"{prefix}.mixers")
        dim = config.hidden_size
        self.wq = ColumnParallelLinear(dim, dim, bias=False, prefix=f"{prefix}.wq")
        self.wo = RowParallelLinear(dim, dim, bias=False, prefix=f"{prefix}.wo")
        self.rotary = rotary(self.head_dim, config.max_position_embeddings, config.rope_theta, dtype)

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(T, dim) for the normed inputs x (T, dim)."""
        query, _ = self.wq(x)
        metadata: Any = get_forward_context().attn_metadata
        caches = (self.states, self.window, self.rows)
        if metadata is None:  # a run without requests, such as vLLM's memory profiling
            states, window, rows = self.profiling_metadata(x)
            states_page, window_page, inputs = (cache.scratch_page(x.device) for cache in caches)
            states_kv, window_kv = (KvPages(page, self.heads) for page in (states_page, window_page))
        else:
            states, window, rows = (metadata[cache.prefix] for cache in caches)
            states_kv, window_kv = (cache.kv_pages(self.heads) for cache in (self.states, self.window))
            inputs = self.rows.pages
        num_tokens = len(rows.tokens.position)  # x may have padding after them
        plan = states.plan(self.chunk_size, self.offset, self.leading_tokens)

        inputs[rows.locate_step(self.rows.spec)] = x[:num_tokens]
        own = x[:num_tokens, self.rank * self.local_dim : (self.rank + 1) * self.local_dim]
        key, value = self.mix(x[:num_tokens], inputs, rows, plan).add_(own)
        query, key = self.rotary(positions[:num_tokens], query[:num_tokens].contiguous(), key)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))

        page_ids, page_rows = window.locate_step(self.window.spec)
        window_kv.write(page_ids, page_rows, key, value)
        states.write_states(states_kv, plan, key, value)
        out = attend(
            query,
            states_kv,
            states.key_table,
            window_kv,
            window.key_table,
            window.query_start_loc,
            window.seq_lens,
            torch.from_numpy(states.tokens.piece).to(x.device),
            plan,
            self.chunk_size,
            self.leading_tokens + 1,
            self.head_dim**-0.5,
        ).flatten(1)
        return self.wo(nn.functional.pad(out, (0, 0, 0, len(x) - num_tokens)) if num_tokens < len(x) else out)[0]

    def mix(self, x: torch.Tensor, inputs: torch.Tensor, rows: AttambaMetadata, plan: ChunkPlan) -> torch.Tensor:
        """The output of each mixer, (mixers, T, local dim), by groups of at most GROUP_ROWS rows of chunks.

        Args:
            x: (T, dim), inputs of the tokens of the step.
            inputs: (num_pages, rows, dim), the cache of the inputs of open chunks.
            rows: metadata of that cache.
            plan: of the layer.
        """
        chunk_index, index_in_chunk = (
            torch.from_numpy(index).to(x.device) for index in (plan.chunk_index, plan.index_in_chunk)
        )
        mixed = x.new_empty(len(MIXERS), len(x), self.local_dim)
        for group, tokens in plan.groups(GROUP_ROWS):
            at = rows.locate(self.rows.spec, plan.chunk_request[group, None], plan.chunk_positions[group])
            indices = (chunk_index[tokens] - group.start, index_in_chunk[tokens])
            for out, part in zip(mixed, self.mixers(x[tokens], inputs[at], *indices), strict=True):
                out[tokens] = part
        return mixed

    def profiling_metadata(self, x: torch.Tensor) -> Iterator[AttambaMetadata]:
        """Metadata of the states, the window and the rows for a run of tokens x (T, dim) that belong to no request.

        vLLM sizes the KV cache by the peak memory of such a run, so the run does what a step of T tokens does at most.
        """
        tokens = profiled_tokens(len(x), self.chunk_size, self.offset, self.leading_tokens, GROUP_ROWS)
        caches = (self.states, self.window, self.rows)
        return (AttambaMetadata.on_one_page(tokens, cache.spec, x.device) for cache in caches)


class AttambaLayer(nn.Module):
    """One layer: attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, config: AttambaConfig, layer: int, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attentive_ssm = AttentiveSsm(config, layer, dtype, f"{prefix}.attentive_ssm")
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = LlamaMLP(
            config.hidden_size, config.intermediate_size, "silu", prefix=f"{prefix}.feed_forward"
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """(T, dim) for hidden states (T, dim) at positions (T,)."""
        hidden = hidden + self.attentive_ssm(positions, self.attention_norm(hidden))
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class AttambaForCausalLM(nn.Module):
    """Attamba. attamba_weights.py maps the names of the checkpoint to the parameters.

    The model runs eagerly, because the host plans each step by the lengths of the batch.

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
        self.tok_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            AttambaLayer(config, layer, dtype, maybe_prefix(prefix, f"layers.{layer}"))
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
        """(T, dim) normed hidden states of the T tokens of a step."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.norm(hidden)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.output, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint; raises ValueError, see ``load_checkpoint``."""
        return load_checkpoint(self, self.config.ssm_inner, weights)


def refuse_features(vllm_config: VllmConfig) -> None:
    """Check a VllmConfig for features with which the model would be silently wrong, or would fail late.

    Raises:
        ValueError: names such a feature that is on.
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
        "disable_hybrid_kv_cache_manager": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "each of the three caches needs its own KV cache group",
        ),
    }
    for feature, (is_on, reason) in refused.items():
        if is_on:
            raise ValueError(f"{feature} is refused with an Attamba model: {reason}")
