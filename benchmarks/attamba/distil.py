"""How far training the mixers alone brings an Attamba made of a transformer.

    python -m benchmarks.attamba.distil models/smollm2-135m-instruct

The mixers of each layer start as its K and V projections (from_transformer.pass_through). Then each layer learns by
itself to add to the residual what the transformer's attention adds, on the transformer's own activations. No gradient
passes through another layer. A layer whose training made it no better on further windows keeps the mixers of the start.
The figures are bits per byte of held-out sources: of the transformer, of the transformer that keeps each P-th key (the
start), and of the trained mixers in all layers together. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.attamba.from_transformer import Llama, Method, pass_through, positive_direction, token_windows
from benchmarks.report import write_json
from examples.attamba_model import chunk_offset, join_chunks, split_chunks
from examples.package_text import TRAIN
from starling.lab.statistics import mean_ratio

RUNS = Path(__file__).resolve().parents[2] / "build" / "attamba_distil"
WINDOW, LENGTH, LENGTHS = 32, 1024, (1024, 2048)
SCALE = 1e-2
"""Of the mixers' inputs, see `pass_through`: 0.5 % of error at the start, and more gradient than with 1e-3."""
RATES = {"in_proj": 1e-4, "out_proj": 5e-5, "conv_weight": 1e-5, "A_log": 1e-3, "D": 1e-3, "ssm_norm": 1e-4}
"""Learning rates; they fall to 0 along a cosine."""


class Student(nn.Module):
    """The mixers of all layers.

    Args:
        model: the transformer.
        chunk: P.
        fit: tokens (T + 1,) to fit the gates on.
    """

    def __init__(self, model: Llama, chunk: int, fit: Tensor) -> None:
        super().__init__()
        self.chunk, self.layers, self.heads = chunk, nn.ModuleList(), model.config["num_attention_heads"]

        def start(layer: int, x: Tensor, _: Tensor) -> None:
            with torch.inference_mode(False):
                gate = positive_direction(x.clone())
                mixers = (pass_through(map_, gate, SCALE, self.heads) for map_ in model.layer_weights(layer))
                self.layers.append(nn.ModuleList(mixers))

        model.bits(fit, Method(1), start)
        self.offsets = [chunk_offset(layer, len(self.layers), chunk) for layer in range(len(self.layers))]

    def keys_values(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """K and V (heads, T, size) of a layer for its normed input without weights (T, hidden)."""
        offset = self.offsets[layer]
        rows, mixers = split_chunks(x[None], self.chunk, offset), cast(nn.ModuleList, self.layers[layer])
        with torch.autocast("cpu", torch.bfloat16):
            mixed = [join_chunks(mixer(rows), len(x), offset)[0] for mixer in mixers]
        key, value = ((x + one.float()).unflatten(-1, (self.heads, -1)).transpose(0, 1) for one in mixed)
        return key, value


class Trainer:
    """Trains each layer of a student on the activations of the transformer.

    Args:
        steps: windows to train on, for the learning rate's decay.
    """

    def __init__(self, model: Llama, student: Student, steps: int) -> None:
        self.model, self.student, self.steps, self.step = model, student, steps, 0
        self.optimisers = [torch.optim.Adam(groups(layer), betas=(0.9, 0.98)) for layer in student.layers]
        self.errors: list[list[float]] = []
        """By step, the square error of each layer over the square of what its attention adds."""

    def train(self, tokens: Tensor) -> None:
        """One step of each layer on a window (T + 1,)."""
        factor = 0.5 * (1 + math.cos(math.pi * self.step / self.steps)) * min(1.0, (self.step + 1) / 10)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * factor
        self.errors.append([])
        self.model.bits(tokens, Method(1), self.train_layer)
        self.step += 1

    def train_layer(self, layer: int, x: Tensor, added: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            x, added = x.clone(), added.clone()
            loss = layer_error(self.model, self.student, layer, x, added)
            loss.backward()
            self.optimisers[layer].step()
            self.optimisers[layer].zero_grad()
        self.errors[-1].append(loss.item())

    def state(self) -> dict[str, object]:
        optimisers = [optimiser.state_dict() for optimiser in self.optimisers]
        settings = repr((WINDOW, LENGTH, SCALE, RATES))
        return {"student": self.student.state_dict(), "optimisers": optimisers, "errors": self.errors, "of": settings}

    def load(self, state: dict[str, object]) -> None:
        """Go on from a ``state``; raises ValueError if it was trained with other settings."""
        if state["of"] != self.state()["of"]:
            raise ValueError(f"the saved mixers were trained with other settings: {state['of']}")
        self.student.load_state_dict(state["student"])
        for optimiser, of_layer in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(of_layer)
        self.errors = state["errors"]
        self.step = len(self.errors)


def groups(mixers: nn.Module) -> list[dict[str, object]]:
    """The parameters of a layer's mixers with their learning rates, as an optimiser takes them."""
    return [
        {"params": [parameter], "rate": next(rate for part, rate in RATES.items() if f".{part}" in f".{name}")}
        for name, parameter in mixers.named_parameters()
    ]


def train(model: Llama, student: Student, windows: list[Tensor]) -> Trainer:
    """Train the student, one step a window, resumed where an earlier call of the same settings was stopped."""
    chunk, steps = student.chunk, len(windows)
    path = RUNS / f"{model.path.name}-p{chunk}-n{steps}.pt"
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(0)).tolist()
    trainer = Trainer(model, student, steps)
    if path.exists():
        trainer.load(torch.load(path, weights_only=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=steps, initial=trainer.step, desc=f"P = {chunk}") as bar:
        while trainer.step < steps:
            trainer.train(windows[order[trainer.step]])
            bar.update()
            if trainer.step % 20 == 0 or trainer.step == steps:
                torch.save(trainer.state(), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
                recent = torch.tensor(trainer.errors[-20:]).mean().item()
                bar.write(f"P = {chunk}, step {trainer.step}: error {recent:.4f}")
    return trainer


def layer_error(model: Llama, student: Student, layer: int, x: Tensor, added: Tensor) -> Tensor:
    """The square error of what the student's layer adds for its input x, over the square of ``added``."""
    found = model.attention(x, layer, Method(student.chunk, WINDOW), student.keys_values)
    return (found - added).square().sum() / added.square().sum()


def layer_errors(model: Llama, student: Student, windows: list[Tensor]) -> Tensor:
    """(layers,) the mean error over windows, as in training."""
    errors: list[list[float]] = []

    def compare(layer: int, x: Tensor, added: Tensor) -> None:
        errors[-1].append(layer_error(model, student, layer, x, added).item())

    for tokens in windows:
        errors.append([])
        model.bits(tokens, Method(1), compare)
    return torch.tensor(errors).mean(0)


def keep_better(model: Llama, start: Student, trained: Student, windows: list[Tensor]) -> list[bool]:
    """Put the start's mixers into the layers of ``trained`` that these make no better; returns which layers stay."""
    better = layer_errors(model, trained, windows) < layer_errors(model, start, windows)
    for layer, stays in enumerate(better.tolist()):
        if not stays:
            trained.layers[layer] = start.layers[layer]
    return better.tolist()


def measure(model: Llama, student: Student, windows: list[Tensor], num_bytes: int) -> dict[str, object]:
    """Bits per byte of held-out windows, and their ratios [mean, lower, upper] over windows."""
    method = Method(student.chunk, WINDOW)
    cases = {"all keys": (Method(1), None), "last tokens": (method, None), "trained": (method, student.keys_values)}
    bits = {
        name: torch.stack([model.bits(tokens, of, None, kv).sum() for tokens in windows]).double().numpy()
        for name, (of, kv) in cases.items()
    }
    return {
        "bits_per_byte": {name: float(of.sum() / num_bytes) for name, of in bits.items()},
        "over_all_keys": {name: mean_ratio(of, bits["all keys"]) for name, of in bits.items()},
        "trained_over_last_tokens": mean_ratio(bits["trained"], bits["last tokens"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Llama")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8], help="P (default: 8)")
    parser.add_argument("--steps", type=int, default=200, help=f"windows of {LENGTH} tokens (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of each length (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = Llama(args.model), AutoTokenizer.from_pretrained(args.model)
    result, windows = {}, token_windows(tokenizer, args.steps, LENGTH, TRAIN)
    further = token_windows(tokenizer, args.steps + 4, LENGTH, TRAIN)
    for chunk in args.chunks:
        torch.manual_seed(0)
        start = Student(model, chunk, windows[0])
        trainer = train(model, copy.deepcopy(start), windows)
        stay = keep_better(model, start, trainer.student, further[1 :: len(further) // 4])
        errors = torch.tensor(trainer.errors)
        row: dict[str, object] = {"layers_trained": sum(stay), "tokens": args.steps * LENGTH}
        row["error_of_attention"] = {"first step": errors[0].mean().item(), "last 20": errors[-20:].mean().item()}
        for length in LENGTHS:
            held_out = token_windows(tokenizer, args.windows, length)
            num_bytes = sum(len(tokenizer.decode(tokens[1:]).encode()) for tokens in held_out)
            row[f"{length} tokens"] = measure(model, trainer.student, held_out, num_bytes)
        result[f"P = {chunk}, L = {WINDOW}"] = row
    print(json.dumps(result, indent=1))
    print(write_json("attamba_distil", {"model": args.model.name, "windows": args.windows, "by_chunk": result}))


if __name__ == "__main__":
    main()
