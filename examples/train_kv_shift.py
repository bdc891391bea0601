"""Train the induction task with and without KV shifting, plot the accuracy, and export the model for serving.

A sequence repeats itself after a number of tokens, its period, which differs between sequences. A token can be
predicted once the token before it has occurred earlier: the model finds that place and answers with the token after it.
Without the shift this needs two layers, one of which copies the previous token to each token. With the shift one layer
is enough (arXiv 2411.19574, section 3).

    python examples/train_kv_shift.py       # minutes on one CPU core; writes figure, table and model to build/kv_shift

docs/kv-shifting.md describes how to serve the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

VOCABULARY, WIDTH, TOKENS, BATCH = 48, 64, 64, 64
PERIODS = (8, 33)
"""Range of the periods in tokens: at least the first number, below the second number."""
THETA = 10_000.0
SERIES = {"1 layer, shifted": (1, True), "1 layer": (1, False), "2 layers": (2, False)}


class Attention(nn.Module):
    """Causal attention with RoPE, (batch, tokens, width) -> the same.

    With ``shifted``, K and V of a token are mixed with those of the previous token, by two scalars per head each.
    ``conv_k`` and ``conv_v`` are (1, 1, heads, 1, 2), columns [previous, current]. Initially current ~ U(0, 1) and
    previous = 1 - current; training is free to change both.
    """

    def __init__(self, width: int, heads: int, shifted: bool):
        super().__init__()
        self.heads, self.shifted = heads, shifted
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        if shifted:
            for name in ("conv_k", "conv_v"):
                current = torch.rand(1, 1, heads, 1, 1)
                self.register_parameter(name, nn.Parameter(torch.cat((1 - current, current), -1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in projections)
        if self.shifted:  # before RoPE
            key, value = shift(key, self.conv_k), shift(value, self.conv_v)
        out = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def shift(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute ``previous * x_{i-1} + current * x_i`` with x_{-1} = 0, for x (batch, heads, tokens, size)."""
    previous, current = weights[:, 0].unbind(-1)
    return previous[..., None] * F.pad(x, (0, 0, 1, 0))[:, :, :-1] + current[..., None] * x


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Apply NeoX RoPE to (batch, heads, tokens, size)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * THETA ** (-torch.arange(half) / half)
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), -1)


class Layer(nn.Module):
    """A Llama layer, (batch, tokens, WIDTH) -> the same."""

    def __init__(self, shifted: bool):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.self_attn = Attention(WIDTH, 1, shifted)
        names = {"gate_proj": (WIDTH, 2 * WIDTH), "up_proj": (WIDTH, 2 * WIDTH), "down_proj": (2 * WIDTH, WIDTH)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in names.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class Model(nn.Module):
    """A Llama of WIDTH. Its parameters have the names of the checkpoint without the prefix ``model.``."""

    def __init__(self, layers: int, shifted: bool):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(shifted) for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens) token ids to (batch, tokens, VOCABULARY) logits."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def sequences(batch: int, period: int) -> torch.Tensor:
    """Return (batch, TOKENS) token ids: ``period`` distinct random ids, repeated."""
    segment = torch.rand(batch, VOCABULARY).argsort(-1)[:, :period]
    return segment.repeat(1, -(-TOKENS // period))[:, :TOKENS]


def predict(model: Model, ids: torch.Tensor, period: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (rows, VOCABULARY) and targets (rows,) of the predictable tokens.

    Those are the tokens after the first repeated one.
    """
    return model(ids)[:, period:-1].flatten(0, 1), ids[:, period + 1 :].flatten()


@torch.no_grad()
def accuracy(model: Model) -> float:
    """Return the accuracy of the most probable token, over sequences of every fourth period."""
    hits = []
    for period in range(*PERIODS, 4):
        logits, targets = predict(model, sequences(100, period), period)
        hits.append((logits.argmax(-1) == targets).float())
    return torch.cat(hits).mean().item()


def train(name: str, steps: int, every: int, seed: int) -> tuple[Model, dict[int, float]]:
    """Return the trained model, and its accuracy by step, measured every ``every`` steps."""
    torch.manual_seed(seed)
    layers, shifted = SERIES[name]
    model = Model(layers, shifted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    curve = {0: accuracy(model)}
    bar = tqdm(range(1, steps + 1), desc=name)
    for step in bar:
        period = int(torch.randint(*PERIODS, ()))
        loss = F.cross_entropy(*predict(model, sequences(BATCH, period), period))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            curve[step] = accuracy(model)
            bar.set_postfix(accuracy=f"{curve[step]:.3f}")
    return model, curve


def export(model: Model, path: Path) -> None:
    """Write a one-layer model as a checkpoint that vLLM serves (KVShiftLlamaForCausalLM)."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors")
    config = {
        "architectures": ["KVShiftLlamaForCausalLM"],
        "model_type": "kv_shift_llama",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_theta": THETA,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=name)
    axes.set(xlabel="training steps", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/kv_shift"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=25, help="steps between measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trained = {name: train(name, options.steps, options.every, options.seed) for name in SERIES}
    curves = {name: curve for name, (_, curve) in trained.items()}
    task = {
        "vocabulary": VOCABULARY,
        "width": WIDTH,
        "tokens": TOKENS,
        "periods": PERIODS,
        "seed": options.seed,
        "batch": BATCH,
    }
    table = {"task": task, "accuracy": curves}
    (options.out / "kv_shift_induction.json").write_text(json.dumps(table, indent=1) + "\n")
    plot(curves, options.out / "kv_shift_induction.png")
    export(trained["1 layer, shifted"][0], options.out / "model")
    for name, curve in curves.items():
        print(f"{name:18}" + "".join(f"{step:>7}: {value:.3f}" for step, value in list(curve.items())[::4]))


if __name__ == "__main__":
    main()
