"""Train a small Attamba, or a transformer with as many parameters, on Python sources; CPU, one core.

    python examples/train_attamba.py --chunk 4 --window 32 --out build/attamba/p4-l32
    python examples/train_attamba.py --model transformer --out build/attamba/transformer
    python examples/train_attamba.py --model transformer --kv-cut 4 --out build/attamba/isokv4
    python examples/train_attamba.py --text packages --length 1024 --autocast --out build/attamba/tokens

The text is the standard library byte by byte, or that of installed packages with a tokenizer and with names that only
the context tells (examples/package_text.py).

`--out` gets a checkpoint that vLLM serves (config.json, model.safetensors, tokenizer), train.log, result.json and
loss.png. The same command resumes a stopped run from its last saved step and gives the same weights as a run without a
stop. A transformer's feed-forward is widened until the transformer has as many parameters as Attamba.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from examples.attamba_model import Attamba, AttambaConfig, write_checkpoint
from examples.package_text import load_package_text, rename
from examples.stdlib_text import END, Text, batch, load_text, windows
from examples.transformer_model import Transformer, TransformerConfig, cut_heads, write_llama

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.033, 1.0  # as in the paper's configurations
KV_BYTES = 2  # bytes of an element of a bf16 KV cache
TEXTS = {"stdlib": load_text, "packages": load_package_text}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with an error message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("attamba", "transformer"), default="attamba")
    parser.add_argument("--chunk", type=int, default=4, help="P, tokens of a chunk (default: %(default)s)")
    parser.add_argument("--window", type=int, default=32, help="L, tokens seen one by one (default: %(default)s)")
    parser.add_argument("--kv-cut", type=int, default=1, help="divide a transformer's KV width by this (default: 1)")
    parser.add_argument("--text", choices=TEXTS, default="stdlib", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--dim", type=int, default=128)
    sizes.add_argument("--layers", type=int, default=4)
    sizes.add_argument("--heads", type=int, default=4)
    sizes.add_argument("--ffn", type=int, default=384, help="feed-forward width of Attamba (default: %(default)s)")
    sizes.add_argument("--ssm-inner", type=int, default=64)
    sizes.add_argument("--ssm-state", type=int, default=32)
    sizes.add_argument("--ssm-heads", type=int, default=4)
    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=int, default=2, help="sequences per step (default: %(default)s)")
    training.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    training.add_argument("--lr", type=float, default=3e-3, help="learning rate after warm-up (default: %(default)s)")
    training.add_argument("--warmup", type=int, default=80, help="warm-up steps (default: %(default)s)")
    training.add_argument("--report-every", type=int, default=100, help="validate and save after this many steps")
    training.add_argument("--windows", type=int, default=256, help="windows of the last validation; 1/8 of the others'")
    training.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the checkpoint")
    training.add_argument("--autocast", action="store_true", help="multiply matrices in bfloat16 in training")
    training.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def count_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def make_model(args: argparse.Namespace, vocabulary: int = END + 1) -> Attamba | Transformer:
    """Make the model that the arguments describe, with weights drawn from the seed.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    config = AttambaConfig(
        vocab_size=vocabulary,
        hidden_size=args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        head_dim=args.dim // args.heads,
        intermediate_size=args.ffn,
        token_chunk=args.chunk,
        leading_tokens=args.window,
        ssm_heads=args.ssm_heads,
        ssm_state_dim=args.ssm_state,
        ssm_inner=args.ssm_inner,
    )
    torch.manual_seed(args.seed)
    attamba = Attamba(config)
    if args.model == "attamba":
        return attamba
    heads, kv_heads, head_dim = cut_heads(args.heads, args.dim // args.heads, args.kv_cut)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": args.dim,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    transformer = Transformer(TransformerConfig(**sizes, intermediate_size=args.ffn))
    missing = count_parameters(attamba) - count_parameters(transformer)
    added_width = round(missing / (3 * args.dim * args.layers))
    torch.manual_seed(args.seed)
    return Transformer(TransformerConfig(**sizes, intermediate_size=args.ffn + added_width))


def kv_bytes(model: Attamba | Transformer) -> tuple[float, int]:
    """Return bytes of the bf16 KV cache: (bytes per token of a long sequence, constant bytes per sequence).

    Attamba adds one K|V row per chunk. Its constant part, at any length, is the K|V rows of the last L tokens and of
    token 0, and the x rows of the open chunk.
    """
    config = model.config
    if isinstance(config, TransformerConfig):
        row = 2 * config.num_key_value_heads * config.head_dim
        return float(KV_BYTES * config.num_hidden_layers * row), 0
    row = 2 * config.hidden_size
    fixed = row * (config.leading_tokens + 1) + config.hidden_size * config.token_chunk
    layers = KV_BYTES * config.num_hidden_layers
    return layers * row / config.token_chunk, layers * fixed


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of (B, T + 1) tokens."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def bits_per_byte(model: nn.Module, tokens: Tensor, token_bytes: Tensor, size: int = 8) -> float:
    """Return mean bits per byte of (N, T + 1) tokens, in batches of ``size``. The end of a file counts as a byte."""
    losses = [mean_loss(model, part).item() * len(part) for part in tokens.split(size)]
    return sum(losses) / len(tokens) / math.log(2) / token_bytes[tokens[:, 1:]].double().mean().item()


def training_batch(args: argparse.Namespace, text: Text, step: int) -> Tensor:
    """Return (batch, length + 1) int64 tokens of a step."""
    tokens = batch(text.train, args.batch, args.length, seed=args.seed, step=step)
    return rename(tokens, text, args.seed * 1_000_003 + step)


def validation_windows(text: Text, count: int, length: int) -> Tensor:
    """Return (count, length + 1) int64 tokens, the same at each call."""
    return rename(windows(text.validation, count, length), text, seed=0)


def make_optimiser(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, tokens: Tensor, lr: float, autocast: bool = False
) -> float:
    """Run one update, with ``autocast`` in mixed bfloat16; returns the loss before the update, in nats."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = mean_loss(model, tokens)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimiser.step()
    return loss.item()


def settings(args: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Return the settings that a run's weights depend on. A saved step with other settings is not resumed."""
    excluded = ("out", "threads", "dtype")
    return {name: value for name, value in vars(args).items() if name not in excluded} | {"text": text.digest}


class Run:
    """The state of a training run. A new Run with the same `--out` resumes from the last `save`.

    Args:
        start: weights to start from; None to draw them.

    Raises:
        SystemExit: the saved state has other settings.
    """

    def __init__(self, args: argparse.Namespace, text: Text, start: dict[str, Tensor] | None = None) -> None:
        self.args, self.settings = args, settings(args, text)
        self.tokenizer = text.tokenizer
        self.model = make_model(args, len(text.token_bytes))
        self.optimiser = make_optimiser(self.model, args.lr)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.saved = args.out / "saved.pt"
        args.out.mkdir(parents=True, exist_ok=True)
        if self.saved.exists():
            self.load()
            self.log(f"resumed at step {self.step}")
        else:
            if start is not None:
                self.model.load_state_dict(start)
            (args.out / "train.log").unlink(missing_ok=True)
            per_token, fixed = kv_bytes(self.model)
            self.log(f"{args.model}: {count_parameters(self.model):,} parameters")
            self.log(f"KV cache: {per_token:.0f} bytes per token and {fixed:,} per sequence in bf16")
            self.log(
                f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
            )
            sizes = f"{len(text.train):,} tokens for training, {len(text.validation):,} for validation"
            self.log(f"text {text.digest}: {sizes}")
            self.log(json.dumps(self.settings))

    def log(self, line: str) -> None:
        """Write a line to the terminal, above the progress bar, and to train.log."""
        tqdm.write(line)
        with (self.args.out / "train.log").open("a") as file:
            file.write(line + "\n")

    def load(self) -> None:
        """Load the saved state; raises SystemExit if it has other settings."""
        state = torch.load(self.saved)
        if state["settings"] != self.settings:
            raise SystemExit(f"{self.saved} belongs to a run with other settings: change --out, or remove the file")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def save(self) -> None:
        """Save the state: to a temporary file that then replaces the old one, so that the saved file is complete."""
        state = {name: getattr(self, name) for name in ("settings", "step", "seconds", "history")}
        state |= {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        unfinished = self.saved.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.saved)

    def finish(self, bits: float) -> None:
        """Write the checkpoint, the plot and result.json, and remove the saved state."""
        per_token, fixed = kv_bytes(self.model)
        result = {
            "settings": self.settings,
            "parameters": count_parameters(self.model),
            "tokens": self.args.steps * self.args.batch * self.args.length,
            "kv_bytes_per_token": per_token,
            "kv_bytes_per_sequence": fixed,
            "bits_per_byte": bits,
            "seconds": self.seconds,
            "history": self.history,
        }
        export(self.model, self.args.out, getattr(torch, self.args.dtype), self.tokenizer)
        plot(self.history, self.args.out / "loss.png")
        (self.args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        self.saved.unlink()


def train(args: argparse.Namespace, text: Text, *, start: dict[str, Tensor] | None = None) -> nn.Module:
    """Train from the last saved step, or from the start, and return the model.

    Args:
        args: result of `parse`.
        text: text to train and validate on.
        start: weights of the first step, or None to draw them from the seed.

    Raises:
        SystemExit: the saved step has other settings.
    """
    run = Run(args, text, start)
    interim_windows = validation_windows(text, max(1, args.windows // 8), args.length)
    sample = rename(windows(text.train, 64, args.length), text, seed=0)
    bytes_per_token = text.token_bytes[sample].double().mean().item()
    losses: list[float] = []
    with tqdm(
        total=args.steps, initial=run.step, desc=args.out.name, unit="step", dynamic_ncols=True, disable=None
    ) as bar:
        while run.step < args.steps:
            started = time.process_time()
            tokens = training_batch(args, text, run.step)
            lr = learning_rate(run.step, args)
            losses.append(train_step(run.model, run.optimiser, tokens, lr, args.autocast))
            run.seconds += time.process_time() - started
            run.step += 1
            bar.update()
            if run.step % args.report_every == 0 or run.step == args.steps:
                train_bits = sum(losses) / len(losses) / math.log(2) / bytes_per_token
                losses.clear()
                validation_bits = bits_per_byte(run.model, interim_windows, text.token_bytes)
                run.history.append({"step": run.step, "train": train_bits, "validation": validation_bits})
                bits = f"train {train_bits:.3f}, validation {validation_bits:.3f} bits"
                run.log(f"step {run.step}: {bits}; {run.seconds:.0f} s")
                run.save()
    final = bits_per_byte(run.model, validation_windows(text, args.windows, args.length), text.token_bytes)
    sizes = f"{args.windows} windows of {args.length}"
    run.log(f"validation {final:.4f} bits per byte, {sizes}; {run.seconds:.0f} s")
    run.finish(final)
    return run.model


def export(model: Attamba | Transformer, path: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model as a checkpoint that vLLM serves."""
    if isinstance(model, Attamba):
        write_checkpoint(path, model.config, model.state_dict(), dtype, tokenizer)
    else:
        write_llama(path, model, dtype, tokenizer)


def plot(history: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    for kind in ("train", "validation"):
        axis.plot([row["step"] for row in history], [row[kind] for row in history], label=kind)
    axis.set_xlabel("step")
    axis.set_ylabel("bits per byte")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if (args.out / "result.json").exists():
        print(f"{args.out}: already trained")
        return
    train(args, TEXTS[args.text]())


if __name__ == "__main__":
    main()
