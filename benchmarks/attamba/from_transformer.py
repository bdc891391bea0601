"""What an Attamba made of a transformer can start from.

    python -m benchmarks.attamba.from_transformer models/smollm2-135m-instruct

Attamba has no K and V projections, but a mixer can compute any linear map of its input (`pass_through`). So an
Attamba whose states are the K and V of each chunk's last token is a transformer that drops all other tokens outside the
window. The benchmark measures, without training:

- bits per byte of held-out Python sources with all keys, with each P-th key and a window of L, with the means of each
  chunk's K and V in place of those of its last token, and with the window and token 0 alone;
- how exactly a mixer passes the last token's K and V through, on the model's own activations.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.report import markdown_table, write_json
from examples.attamba_model import AttambaConfig, Mixer, chunk_offset, split_chunks, visible_mask
from examples.package_text import VALIDATION, read_packages
from starling.lab.statistics import mean_ratio

WINDOW = 32
ROWS = 256
"""Queries of which the attention is computed at once."""


@dataclass(frozen=True)
class Method:
    """What a token sees: ``chunk`` 1: all tokens; 0: the window and token 0; ``means``: of chunks, not last tokens."""

    chunk: int
    window: int = WINDOW
    means: bool = False

    @property
    def name(self) -> str:
        if self.chunk == 1:
            return "all keys"
        if self.chunk == 0:
            return f"window of {self.window} and token 0"
        return f"P = {self.chunk}, L = {self.window}, {'means' if self.means else 'last tokens'}"


METHODS = [
    Method(1),
    *(Method(chunk) for chunk in (2, 3, 4, 8)),
    Method(4, means=True),
    Method(8, means=True),
    Method(0),
]


def expand(x: Tensor, heads: int) -> Tensor:
    """(KV heads, T, size) to (heads, T, size)."""
    return x.repeat_interleave(heads // len(x), 0)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of the two halves of a head, (heads, T, size) at (T,) positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().float(), angles.sin().float()
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def chunk_means(x: Tensor, chunk: int, offset: int) -> Tensor:
    """(heads, states, size): token 0, and the mean of the tokens of each complete chunk, from (heads, T, size)."""
    rows = split_chunks(x, chunk, offset)  # zeros before the first tokens of the first chunk
    complete = (x.shape[1] + offset) // chunk
    counts = split_chunks(torch.ones_like(x[:1, :, :1]), chunk, offset).sum(2)
    return (rows.sum(2) / counts.clamp(min=1))[:, : complete + 1]


def boundaries(length: int, chunk: int, offset: int) -> Tensor:
    """The positions of the states: token 0, and the last token of each complete chunk (0 again for one of no token)."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(chunk - 1 - offset, length, chunk)])


def attend(q: Tensor, k: Tensor, v: Tensor, method: Method, offset: int, theta: float) -> Tensor:
    """(heads, T, size) attention of q over k and v, all before RoPE."""
    length = q.shape[1]
    tokens = torch.arange(length)
    rotated, keys, values = rotate(q, tokens, theta), rotate(k, tokens, theta), v
    if method.means:
        places = boundaries(length, method.chunk, offset)
        keys = torch.cat([rotate(chunk_means(k, method.chunk, offset), places, theta), keys], 1)
        values = torch.cat([chunk_means(v, method.chunk, offset), v], 1)
        # A state is seen once it has left the window, a token while it is in the window.
        recent = tokens[:, None] - method.window
        first = torch.ones(len(places), dtype=torch.bool)
        first[1:] = places[1:] > 0
        mask = torch.cat([(places < recent) & first, (tokens >= recent) & (tokens <= tokens[:, None])], 1)
    else:
        # A chunk longer than the sequence leaves the window and token 0.
        mask = visible_mask(length, method.chunk or 2 * length, method.window, offset)
    parts = []
    for first_row in range(0, length, ROWS):
        rows = mask[first_row : first_row + ROWS]
        seen = rows.any(0).nonzero().flatten()
        one = rotated[:, first_row : first_row + ROWS]
        parts.append(F.scaled_dot_product_attention(one, keys[:, seen], values[:, seen], attn_mask=rows[:, seen]))
    return torch.cat(parts, 1)


KeysValues = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class Llama:
    """A Llama from a checkpoint, for a single sequence; matrices are multiplied in ``dtype``."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype, self.path = dtype, path
        self.config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        self.weights = {name.removeprefix("model."): weight for name, weight in tensors.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.to(self.dtype), self.weights[f"{name}.weight"].to(self.dtype)).float()

    def norm(self, h: Tensor, name: str | None) -> Tensor:
        """RMSNorm with the weight of that name, or with none."""
        weight = None if name is None else self.weights[f"{name}.weight"].float()
        return F.rms_norm(h, h.shape[-1:], weight, self.config["rms_norm_eps"])

    def layer_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer as (hidden, hidden) maps of the normed input without weights, of all query heads."""
        heads, scale = self.config["num_attention_heads"], self.weights[f"layers.{layer}.input_layernorm.weight"]
        maps = []
        for name in ("k_proj", "v_proj"):
            weight = self.weights[f"layers.{layer}.self_attn.{name}.weight"].float() * scale.float()
            maps.append(expand(weight.unflatten(0, (self.config["num_key_value_heads"], -1)), heads).flatten(0, 1))
        return maps[0], maps[1]

    def project(self, normed: Tensor, layer: int, name: str) -> Tensor:
        """(heads, T, size): q_proj, k_proj or v_proj of a layer's normed input without weights (T, hidden)."""
        heads = self.config["num_attention_heads"]
        x = normed * self.weights[f"layers.{layer}.input_layernorm.weight"].float()
        found = self.linear(x, f"layers.{layer}.self_attn.{name}")
        return expand(found.unflatten(-1, (-1, normed.shape[-1] // heads)).transpose(0, 1), heads)

    def attention(self, normed: Tensor, layer: int, method: Method, keys_values: KeysValues | None = None) -> Tensor:
        """(T, hidden): what a layer's attention adds to the residual, for its normed input without weights.

        Args:
            keys_values: K and V of a layer (heads, T, size) from its number and that input; by default the model's.
        """
        if keys_values is None:
            k, v = (self.project(normed, layer, name) for name in ("k_proj", "v_proj"))
        else:
            k, v = keys_values(layer, normed)
        offset = chunk_offset(layer, self.config["num_hidden_layers"], method.chunk) if method.chunk else 0
        theta = self.config["rope_parameters"]["rope_theta"]
        out = attend(self.project(normed, layer, "q_proj"), k, v, method, offset, theta)
        return self.linear(out.transpose(0, 1).flatten(1), f"layers.{layer}.self_attn.o_proj")

    @torch.inference_mode()
    def bits(
        self,
        tokens: Tensor,
        method: Method,
        see: Callable[[int, Tensor, Tensor], None] | None = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """(T,) bits of each of (T + 1,) tokens but the first.

        Args:
            see: called for each layer with its number, its normed input without weights, and what ``attention`` gives.
            keys_values: see ``attention``.
        """
        config = self.config
        h = self.weights["embed_tokens.weight"][tokens[:-1]].float()
        for layer in range(config["num_hidden_layers"]):
            prefix = f"layers.{layer}"
            normed = self.norm(h, None)
            added = self.attention(normed, layer, method, keys_values)
            if see is not None:
                see(layer, normed, added)
            h = h + added
            x = self.norm(h, f"{prefix}.post_attention_layernorm")
            gate, up = (self.linear(x, f"{prefix}.mlp.{name}") for name in ("gate_proj", "up_proj"))
            h = h + self.linear(F.silu(gate) * up, f"{prefix}.mlp.down_proj")
        logits = self.linear(self.norm(h, "norm"), "embed_tokens" if config["tie_word_embeddings"] else "lm_head")
        return F.cross_entropy(logits, tokens[1:], reduction="none") / math.log(2)


def pass_through(wanted: Tensor, positive: Tensor, scale: float = 1e-3, heads: int = 1) -> Mixer:
    """A mixer whose output is ``wanted`` x - x of its last token x, so that x + SSM(x) is ``wanted`` x.

    SiLU(s x) nears s x / 2 as s goes to 0. B = 0 empties the state, but C is random, so that B has a gradient. The
    gates of all channels are equal, and the mixer's RMSNorm removes them together with the length of x, which is
    constant for an input that is normed without weights.

    Args:
        wanted: (dim, dim) map.
        positive: (dim,), its product with every x must be positive: the gate.
        scale: s; the relative error is about s / 2.
        heads: of the mixer, a divisor of dim.
    """
    dim = len(wanted)
    config = AttambaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, ssm_inner=dim, ssm_heads=heads)
    mixer, identity = Mixer(config), torch.eye(dim)
    with torch.no_grad():
        mixer.in_proj.weight[:dim] = positive / scale**2  # far above 1, where SiLU(z) is z, and above the norm's eps
        mixer.in_proj.weight[dim : 2 * dim] = identity
        mixer.in_proj.weight[2 * dim : 2 * dim + config.ssm_state_dim] = 0  # B
        mixer.conv_weight.zero_()
        mixer.conv_weight[:, -1] = 1
        mixer.conv_weight[:dim, -1] = scale
        mixer.out_proj.weight.copy_(wanted - identity)
    return mixer


def positive_direction(x: Tensor) -> Tensor:
    """(dim,), a direction whose product with each of x (T, dim) is near 1."""
    ridge = len(x) * 1e-3 * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + ridge, x.sum(0))


@torch.inference_mode()
def initialisation(model: Llama, fit: Tensor, check: Tensor) -> dict[str, list[float]]:
    """How exact `pass_through` is for K and V of each layer, on the activations of ``check``.

    Returns:
        By layer: `gate_positive`, the share of tokens with a positive gate, whose direction is fitted on ``fit``; and
        `error_k`, `error_v`, the root mean square error over that of K or V, for these tokens.
    """
    inputs: dict[int, list[Tensor]] = {}
    for tokens in (fit, check):
        model.bits(tokens, Method(1), lambda layer, x, _: inputs.setdefault(layer, []).append(x))
    result: dict[str, list[float]] = {"gate_positive": [], "error_k": [], "error_v": []}
    for layer, (first, second) in inputs.items():
        positive = positive_direction(first)
        good = second @ positive > 0
        result["gate_positive"].append(good.double().mean().item())
        x = second[good]
        for name, wanted in zip(("error_k", "error_v"), model.layer_weights(layer), strict=True):
            found = x + pass_through(wanted, positive)(x[:, None, None])[:, 0, 0]
            expected = x @ wanted.T
            result[name].append(((found - expected).norm() / expected.norm()).item())
    return result


def token_windows(
    tokenizer: PreTrainedTokenizerFast, count: int, length: int, packages: tuple[str, ...] = VALIDATION
) -> list[Tensor]:
    """``count`` windows of ``length`` + 1 tokens, at equal distances over packages' sources; by default held out."""
    text = "\n".join(read_packages(packages, set()))
    pieces = [text[i * len(text) // count :][: 8 * length] for i in range(count)]
    return [torch.tensor(tokenizer(piece)["input_ids"][: length + 1]) for piece in pieces]


def measure(model: Llama, tokenizer: PreTrainedTokenizerFast, windows: list[Tensor]) -> dict[str, dict[str, object]]:
    """Bits per byte of each method, and `over_all_keys` [ratio, lower, upper] over windows."""
    bits, rows = {}, {}
    size = sum(len(tokenizer.decode(tokens[1:]).encode()) for tokens in windows)
    for method in METHODS:
        bits[method] = torch.stack([model.bits(tokens, method).sum() for tokens in windows]).double().numpy()
        ratio = mean_ratio(bits[method], bits[METHODS[0]])
        rows[method.name] = {"bits_per_byte": float(bits[method].sum() / size), "over_all_keys": ratio}
        print(f"{len(windows)} x {len(windows[0]) - 1}, {method.name}: {rows[method.name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Llama")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--windows", type=int, default=8, help="of each length (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = Llama(args.model), AutoTokenizer.from_pretrained(args.model)
    fit, check = token_windows(tokenizer, 2, 1024)
    result: dict[str, object] = {"model": args.model.name, "initialisation": initialisation(model, fit, check)}
    print(result["initialisation"], flush=True)
    lengths = {n: measure(model, tokenizer, token_windows(tokenizer, args.windows, n)) for n in args.lengths}
    rows = [[method.name, *(f"{lengths[n][method.name]['bits_per_byte']:.3f}" for n in lengths)] for method in METHODS]
    print(markdown_table(["bits per byte", *(f"{n:,} tokens" for n in lengths)], rows))
    print(write_json("attamba_from_transformer", result | {"windows": args.windows, "bits": lengths}))


if __name__ == "__main__":
    main()
