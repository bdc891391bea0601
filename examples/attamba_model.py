"""Attamba (arXiv 2411.17685) for training, in plain PyTorch: whole sequences, explicit masks, no engine code.

    model = load_attamba(path)        # or Attamba(AttambaConfig(token_chunk=8, leading_tokens=16))
    logits = model(tokens)            # (B, T) int64 -> (B, T, vocab_size) float, T >= 1; computes in the weights' dtype

Layer i of n replaces the K and V projections of a Llama layer by two Mamba-2 mixers that run inside chunks of P tokens:

    x = RMSNorm(h);  q = RoPE(W_q x);  K = RoPE(x + SSM_k(x));  V = x + SSM_v(x)

A chunk ends at its *boundary*: a position k P - 1 - off_i (k = 1, 2, ...), with off_i = min(P - 1, i * floor(P / n)).
Token 0 is a chunk of its own, and a boundary. Token t attends to the boundaries before it, to the L tokens before it,
and to itself.

The paper and its code leave some points open. This implementation decides them as follows:
- Conv and state start from zero at each chunk's first token (the released code mixes offsets of different chunks).
- The last token of a sequence is a boundary only if the formula above gives its position. The released code moves the
  last boundary to the end of the training sequence, so that a token's chunk depends on later tokens.
- With off_i = P - 1 the formula gives position 0 itself: one boundary, not two.
- A boundary inside the window counts once. A window row is the running SSM output at that token, so a boundary has the
  same K and V as a state and as a window row.
- RoPE is interleaved: it rotates the pair (2 j, 2 j + 1) by t * theta^(-2 j / head_dim). Scores are scaled by
  head_dim^-0.5.
- The mixers have one group of B and C, and no bias in the conv and on dt. The channels of the conv are u, B, C in this
  order, and `conv_weight[:, -1]` weighs the token itself. `u` in D u is the output of conv and SiLU. `ssm_norm` is over
  all of `ssm_inner`. All norms use `rms_norm_eps`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from benchmarks.random_llama import byte_tokenizer

UNCUT, BLOCK = 512, 256
"""Attention over longer sequences than the first number of tokens is computed in blocks of the second."""


@dataclass(frozen=True)
class AttambaConfig:
    """The sizes in `config.json`, with the same names.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 384
    token_chunk: int = 4
    """P, tokens of a chunk."""
    leading_tokens: int = 32
    """L, the tokens before itself that a token sees besides the boundaries."""
    ssm_heads: int = 4
    ssm_state_dim: int = 32
    ssm_inner: int = 64
    """Width of u and z: ssm_heads times the size of a mixer's head."""
    conv_size: int = 4
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    def __post_init__(self) -> None:
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError("num_attention_heads * head_dim must be hidden_size, because K and V are as wide as x")
        if self.ssm_inner % self.ssm_heads:
            raise ValueError("ssm_inner must be a multiple of ssm_heads")
        if min(self.token_chunk, self.leading_tokens) < 1:
            raise ValueError("token_chunk and leading_tokens must be at least 1")


def chunk_offset(layer: int, num_layers: int, chunk_size: int) -> int:
    """Return the tokens by which a layer's boundaries come earlier than P - 1, 2 P - 1, ...

    "cyclic" in the paper's code.
    """
    return min(chunk_size - 1, layer * (chunk_size // num_layers))


def split_chunks(x: Tensor, chunk_size: int, offset: int) -> Tensor:
    """Cut (B, T, D) into chunks, one per row: (B, N, P, D).

    Row 0 is token 0 alone, and row 1 starts at token 1. Both have zeros before their tokens, the last row after them.
    """
    first = F.pad(x[:, :1], (0, 0, chunk_size - 1, 0))
    rest = F.pad(x[:, 1:], (0, 0, 1 + offset, -(x.shape[1] + offset) % chunk_size))
    return torch.cat([first, rest], dim=1).unflatten(1, (-1, chunk_size))


def join_chunks(rows: Tensor, length: int, offset: int) -> Tensor:
    """Undo `split_chunks`: (B, N, P, D) to (B, T, D), T = `length`."""
    chunk_size, flat = rows.shape[2], rows.flatten(1, 2)
    start = chunk_size + offset
    return torch.cat([flat[:, chunk_size - 1 : chunk_size], flat[:, start + 1 : start + length]], dim=1)


def visible_mask(length: int, chunk_size: int, window: int, offset: int) -> Tensor:
    """Return (T, T) bool, T = `length`: True where token t (row) sees token s (column)."""
    t, s = torch.arange(length)[:, None], torch.arange(length)[None, :]
    boundary = (s == 0) | ((s + 1 + offset) % chunk_size == 0)
    return (boundary & (s < t)) | ((t - window <= s) & (s <= t))


@functools.cache
def visible_blocks(length: int, chunk_size: int, window: int, offset: int) -> list[tuple[slice, Tensor, Tensor]]:
    """Return the rows of `visible_mask`, in blocks, without the columns that no row of a block sees.

    Returns:
        For each block its rows, its columns (C,), and its part of the mask (rows, C).
    """
    mask, blocks = visible_mask(length, chunk_size, window, offset), []
    size = length if length <= UNCUT else BLOCK
    for start in range(0, length, size):
        rows = mask[start : start + size]
        columns = rows.any(0).nonzero().flatten()
        blocks.append((slice(start, start + size), columns, rows[:, columns]))
    return blocks


def attend_visible(q: Tensor, k: Tensor, v: Tensor, blocks: list[tuple[slice, Tensor, Tensor]]) -> Tensor:
    """Compute attention under a mask given by `visible_blocks`; q, k, v and output are (B, heads, T, head_dim)."""
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, rows], k.index_select(2, columns), v.index_select(2, columns), attn_mask=mask
        )
        for rows, columns, mask in blocks
    ]
    return torch.cat(parts, dim=2)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply interleaved RoPE at positions 0, 1, ... of (B, heads, T, head_dim), computed in float32 or float64."""
    length, size = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    wide = torch.promote_types(x.dtype, torch.float32)
    turns = torch.complex(angles.cos(), angles.sin()).to(wide.to_complex())
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class CausalConv(torch.autograd.Function):
    """Depthwise causal convolution of (..., P, channels) with weights (channels, width), without copies of the input.

    Autograd's own derivative of the same sums takes two to four times as long: it pads a copy of the input for each
    tap.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x * weight[:, -1]
        for back in range(1, min(weight.shape[1], x.shape[-2])):
            out[..., back:, :] += x[..., :-back, :] * weight[:, -1 - back]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x, weight), (of_out,) = ctx.saved_tensors, gradients
        of_x, of_weight = of_out * weight[:, -1], torch.zeros_like(weight)
        of_weight[:, -1] = (of_out * x).flatten(0, -2).sum(0)
        for back in range(1, min(weight.shape[1], x.shape[-2])):
            later = of_out[..., back:, :]
            of_x[..., :-back, :] += later * weight[:, -1 - back]
            of_weight[:, -1 - back] = (later * x[..., :-back, :]).flatten(0, -2).sum(0)
        return of_x.to(x.dtype), of_weight


class Mixer(nn.Module):
    """A Mamba-2 mixer within each row: (B, N, P, dim) -> (B, N, P, dim).

    The scan is its masked matrix (Mamba-2's SSD form), P x P per row and head: with a_t = dt_t A,
    y_t = sum over s <= t of (C_t . B_s) exp(a_(s+1) + ... + a_t) dt_s u_s, plus D u_t. Zeros at the start of a row do
    not change its outputs: conv and in_proj have no bias, so u, B and the state are zero there.
    """

    def __init__(self, config: AttambaConfig) -> None:
        super().__init__()
        self.inner, self.state, self.heads = config.ssm_inner, config.ssm_state_dim, config.ssm_heads
        mixed = self.inner + 2 * self.state
        self.in_proj = nn.Linear(config.hidden_size, self.inner + mixed + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(mixed, config.conv_size))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.ssm_norm = nn.RMSNorm(self.inner, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)
        nn.init.normal_(self.conv_weight, std=config.conv_size**-0.5)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 2.0).log_()  # the released configurations' range of -A

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, P, dim) to (B, N, P, dim)."""
        z, mixed, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.state, self.heads], dim=-1)
        u, b, c = F.silu(CausalConv.apply(mixed, self.conv_weight)).split([self.inner, self.state, self.state], dim=-1)
        u = u.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (B, N, heads, P, size)
        dt = F.softplus(dt).transpose(-2, -1)  # (B, N, heads, P)
        sums = (-self.A_log.exp()[:, None] * dt).cumsum(-1)
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()
        scores = (c @ b.transpose(-2, -1)).unsqueeze(-3) * decay * dt.unsqueeze(-2)
        y = scores @ u + self.D[:, None, None] * u
        y = y.transpose(-3, -2).flatten(-2)
        return self.out_proj(self.ssm_norm(y * F.silu(z)))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class AttentiveSSM(nn.Module):
    """The query and output projections of Attamba's attention."""

    def __init__(self, config: AttambaConfig) -> None:
        super().__init__()
        self.wq = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


class Layer(nn.Module):
    """A layer with the residuals of Llama, (B, T, hidden_size) -> the same.

    Subclasses make `attention_norm`, `ffn_norm` and `feed_forward`, and define `attend`.
    """

    def attend(self, x: Tensor) -> Tensor:
        """Compute attention on normed inputs (B, T, hidden_size)."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attend(self.attention_norm(h))
        return h + self.feed_forward(self.ffn_norm(h))


class LanguageModel(nn.Module):
    """Embedding, layers, final norm and output head.

    Args:
        config: an `AttambaConfig` or another configuration with its common fields.
        make_layer: makes the layer with the given index.
    """

    def __init__(self, config: Any, make_layer: Callable[[int], Layer]) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the next-token logits: (B, T) int64 -> (B, T, vocab_size)."""
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


class AttambaLayer(Layer):
    """A layer of Attamba."""

    def __init__(self, config: AttambaConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.offset = chunk_offset(layer, config.num_hidden_layers, config.token_chunk)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attentive_ssm = AttentiveSSM(config)
        self.k_ssm, self.v_ssm = Mixer(config), Mixer(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size)

    def attend(self, x: Tensor) -> Tensor:
        config, length = self.config, x.shape[1]
        rows = split_chunks(x, config.token_chunk, self.offset)
        key = x + join_chunks(self.k_ssm(rows), length, self.offset)
        value = x + join_chunks(self.v_ssm(rows), length, self.offset)
        query = self.attentive_ssm.wq(x)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in (query, key, value))
        blocks = visible_blocks(length, config.token_chunk, config.leading_tokens, self.offset)
        out = attend_visible(rotate(q, config.rope_theta), rotate(k, config.rope_theta), v, blocks)
        return self.attentive_ssm.wo(out.transpose(1, 2).flatten(-2))


class Attamba(LanguageModel):
    """The language model. Its state dict has the names and shapes of the served checkpoint."""

    def __init__(self, config: AttambaConfig) -> None:
        super().__init__(config, lambda layer: AttambaLayer(config, layer))


def initialise(model: nn.Module) -> None:
    """Draw embeddings from N(0, 1), and matrices from a normal distribution with variance 1 / (3 input width).

    So a layer at first adds less to the residual stream than the embedding of a token, and small models learn in some
    hundred steps to look for tokens in their context. The released code draws all matrices with variance 1 / (input
    width), so that a layer adds several times as much as the embedding has.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


def write_checkpoint(
    path: Path,
    config: AttambaConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Write a checkpoint in the served layout: config.json, model.safetensors, the tokenizer (None: that of bytes).

    Matrices have torch's Linear layout, (out, in).
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or byte_tokenizer()
    tensors = {name: weight.detach().to(dtype).contiguous() for name, weight in weights.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = {"architectures": ["AttambaForCausalLM"], "model_type": "attamba"} | dataclasses.asdict(config)
    fields |= {
        "num_key_value_heads": config.num_attention_heads,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    tokenizer.save_pretrained(path)


def load_attamba(path: Path | str, dtype: torch.dtype = torch.float32) -> Attamba:
    """Load any checkpoint in the served layout as a model in `dtype`.

    Raises:
        RuntimeError: the checkpoint has missing, unknown or misshapen tensors.
    """
    fields = json.loads((Path(path) / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(AttambaConfig)}
    model = Attamba(AttambaConfig(**{name: value for name, value in fields.items() if name in names}))
    model.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return model.to(dtype).eval()
