"""Attamba for vLLM: what attention_backends/attamba/ computes, between vLLM's own layers.

K and V are the layer's input plus a state space mixer each, so there is no projection of them to split: over tensor-
parallel ranks the mixers run whole on each, and only their last product, the queries and `wo` are split by heads.
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
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import maybe_prefix

from attention_backends.attamba.attend import attend
from attention_backends.attamba.cache import PagedRows, cache_specs
from attention_backends.attamba.chunks import layer_offset
from attention_backends.attamba.dispatch import chunk_scan
from attention_backends.attamba.scan import Sizes
from engine_ext.models.attamba_config import AttambaConfig
from engine_ext.models.attamba_weights import MIXERS, load_checkpoint


class Mixers(nn.Module):
    """SSM_k and SSM_v: Mamba-2 mixers of one input over each chunk alone, whose outputs are split over ranks."""

    def __init__(self, config: AttambaConfig, prefix: str) -> None:
        super().__init__()
        self.sizes = Sizes(config.ssm_heads, config.ssm_inner, config.ssm_state_dim, config.conv_size)
        self.eps = config.rms_norm_eps
        dim, inner, heads, count = config.hidden_size, config.ssm_inner, config.ssm_heads, len(MIXERS)
        convolved = inner + 2 * config.ssm_state_dim
        # in_proj in two: of tokens of earlier steps the gate is not needed again.
        self.gate, self.inputs = (
            MergedColumnParallelLinear(dim, [width] * count, bias=False, prefix=f"{prefix}.{name}", disable_tp=True)
            for name, width in (("gate", inner), ("inputs", convolved + heads))
        )
        self.conv_weight = stacked(count, convolved, config.conv_size)
        self.A_log, self.D = (stacked(count, heads, dtype=torch.float32) for _ in range(2))
        self.norm_weight = stacked(count, inner)
        self.out_proj = nn.ModuleList(
            ColumnParallelLinear(inner, dim, bias=False, prefix=f"{prefix}.out_proj.{index}") for index in range(count)
        )

    def forward(
        self, x: torch.Tensor, chunks: torch.Tensor, chunk: torch.Tensor, place: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Of each mixer (T, local dim) for the tokens x (T, dim); token t is number ``place[t]`` of chunk ``chunk[t]``.

        Args:
            chunks: (N, W, dim), the inputs of each chunk from its first token on.
        """
        projected, gate = (
            linear(rows)[0].unflatten(-1, (len(MIXERS), -1)) for linear, rows in ((self.inputs, chunks), (self.gate, x))
        )
        y = chunk_scan(projected, self.conv_weight, self.A_log, self.D, self.sizes, chunk, place)
        y = nn.functional.rms_norm(y * nn.functional.silu(gate.float()), y.shape[-1:], eps=self.eps) * self.norm_weight
        return (linear(part)[0] for linear, part in zip(self.out_proj, y.to(x.dtype).unbind(1), strict=True))


def stacked(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter with a row a mixer."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def load(parameter: nn.Parameter, tensor: torch.Tensor, mixer: int) -> None:
        if tensor.shape != parameter.shape[1:]:
            raise ValueError(f"it is of shape {tuple(parameter.shape[1:])}")
        parameter.data[mixer].copy_(tensor)

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


class ExactRotary(RotaryEmbedding):
    """vLLM's, with angles in float64: in float32 they are off by 1e-3 at 32k tokens, which sharp scores show."""

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        positions = torch.arange(self.max_position_embeddings, dtype=torch.float64)
        angles = torch.outer(positions, self.base**-exponents)
        return torch.cat((angles.cos(), angles.sin()), -1).float()


@functools.cache
def rotary(head_dim: int, positions: int, theta: float, dtype: torch.dtype) -> ExactRotary:
    """The one table that all layers share; pairs (2 j, 2 j + 1) turn together."""
    return ExactRotary(head_dim, head_dim, positions, theta, False, dtype)


class AttentiveSsm(nn.Module):
    """One layer's attention, its mixers and its three caches."""

    def __init__(self, config: AttambaConfig, layer: int, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if config.num_attention_heads % self.ranks:
            raise ValueError(f"{config.num_attention_heads} heads can't be split over {self.ranks} ranks")
        self.heads = config.num_attention_heads // self.ranks
        self.head_dim, self.local_dim = config.head_dim, self.heads * config.head_dim
        self.chunk, self.window = config.token_chunk, config.leading_tokens
        self.offset = layer_offset(layer, config.num_hidden_layers, self.chunk)
        specs = cache_specs(self.chunk, self.window, config.hidden_size, self.local_dim, dtype)
        self.states, self.recent, self.rows = (
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
        if metadata is None:  # vLLM measures memory
            return self.wo(query)[0]
        states, recent, rows = (metadata[cache.prefix] for cache in (self.states, self.recent, self.rows))
        tokens = len(rows.rows.position)  # x may be padded past them
        plan = states.plan(self.chunk, self.offset, self.window)

        inputs = self.rows.pages
        inputs[rows.places(self.rows.spec)] = x[:tokens]
        chunks = inputs[rows.places_of(self.rows.spec, plan.chunk_request[:, None], plan.chunk_position)]
        chunk, place = (torch.from_numpy(index).to(x.device) for index in (plan.token_chunk, plan.token_place))
        own = x[:tokens, self.rank * self.local_dim : (self.rank + 1) * self.local_dim]
        key, value = (own + mixed for mixed in self.mixers(x[:tokens], chunks, chunk, place))
        query, key = self.rotary(positions[:tokens], query[:tokens].contiguous(), key)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))

        states_kv, recent_kv = (cache.kv_pages(self.heads) for cache in (self.states, self.recent))
        page, row = recent.places(self.recent.spec)
        recent_kv.write(page, row, key, value)
        states.write_states(states_kv, plan, key, value)
        out = attend(
            query,
            states_kv,
            states.key_table,
            recent_kv,
            recent.key_table,
            recent.query_start_loc,
            recent.seq_lens,
            torch.from_numpy(states.rows.piece).to(x.device),
            plan,
            self.chunk,
            self.window + 1,
            self.head_dim**-0.5,
        ).flatten(1)
        return self.wo(nn.functional.pad(out, (0, 0, 0, len(x) - tokens)) if tokens < len(x) else out)[0]


class AttambaLayer(nn.Module):
    def __init__(self, config: AttambaConfig, layer: int, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attentive_ssm = AttentiveSsm(config, layer, dtype, f"{prefix}.attentive_ssm")
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = LlamaMLP(
            config.hidden_size, config.intermediate_size, "silu", prefix=f"{prefix}.feed_forward"
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attentive_ssm(positions, self.attention_norm(hidden))
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class AttambaForCausalLM(nn.Module):
    """Attamba with its checkpoint's names translated (attamba_weights.py). Runs eagerly: its steps are planned on the
    host, by the lengths of the batch.

    Raises:
        ValueError: a configuration that the caches can't carry, or a feature of vLLM that this model does not have.
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
        """(T, dim) normed hidden states of the tokens of a step."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.norm(hidden)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.output, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_checkpoint(self, self.config.ssm_inner, weights)


def refuse_features(vllm_config: VllmConfig) -> None:
    """Refuse by name what would be silently wrong, or fail late (raises ValueError)."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    refused = {
        f"kv_cache_dtype={cache.cache_dtype}": (
            cache.cache_dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")),
            "the caches keep the model's dtype",
        ),
        "speculative decoding": (vllm_config.speculative_config is not None, "steps are planned for tokens that stay"),
        f"quantization={vllm_config.model_config.quantization}": (
            vllm_config.quant_config is not None,
            "no quantised checkpoint of it exists",
        ),
        "decode context parallelism": (parallel.decode_context_parallel_size > 1, "the caches are not split by tokens"),
        "prefill context parallelism": (parallel.prefill_context_parallel_size > 1, "chunks are not split over ranks"),
        "dual-batch overlap": (parallel.enable_dbo, "steps are planned whole"),
        "disable_hybrid_kv_cache_manager": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "the three caches need a group each",
        ),
    }
    for feature, (asked, reason) in refused.items():
        if asked:
            raise ValueError(f"{feature} is refused with an Attamba model: {reason}")
