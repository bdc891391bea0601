"""The recall task of `benchmarks.attamba.quality`: small models of their own, trained to find a token in the context.

A row repeats a segment of SEGMENT distinct random keys after a distance of D tokens, with random fillers between the
copies (a D below SEGMENT has D keys and no fillers). A key of the second copy is predicted by finding the token before
it in the first copy and answering with the token that followed there (induction). Nothing but the context tells it: a
guess is right for one key of KEYS.

All models see the same rows in the same order. The rows get longer, and D with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.train_attamba import CLIP, count_parameters, kv_bytes, make_model, make_optimiser, parse

KEYS, FILLERS, SEGMENT = 64, 32, 32
DISTANCES = (16, 32, 64, 128, 256, 512)
SHORTEST = 8
"""The shortest distance in training. The longest is half a row."""
STAGES = ((200, 64), (40, 128), (40, 256), (40, 512), (60, 1024))
"""Steps, and tokens of a row in these steps."""
STEP_TOKENS, WARMUP, DECAY = 4096, 50, 0.3
"""Tokens of a step, steps of warm-up, and the share of the steps at the end in which the learning rate falls to 0."""
ROWS = 66
"""Rows at each distance in the evaluation: about 2,000 tokens to recall."""
UNSCORED = -100
SIZES = ["--dim", "64", "--heads", "2", "--layers", "2", "--ffn", "128", "--ssm-inner", "32", "--ssm-heads", "2"]


def make_rows(distances: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (rows, length + 1) int64 tokens and (rows, length) targets.

    Targets are UNSCORED where the context does not give the token.

    Args:
        distances: (rows,) int64, D of each row.
    """
    rows, position = len(distances), torch.arange(length + 1)
    copy, offset = position // distances[:, None], position % distances[:, None]
    order = torch.rand(rows, KEYS, generator=generator).argsort(1)
    fillers = KEYS + torch.randint(FILLERS, (rows, length + 1), generator=generator)
    is_key = offset < SEGMENT
    tokens = torch.where(is_key, order.gather(1, offset.clamp(max=SEGMENT - 1)), fillers)
    scored = is_key & (offset > 0) & (copy > 0)  # the token before the first key of a copy is another one in each copy
    return tokens, tokens.where(scored, UNSCORED)[:, 1:]


def training_rows(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows of a step, with log-uniform distances from SHORTEST to half of ``length``."""
    low, high = math.log(SHORTEST), math.log(length // 2 + 1)
    distances = (low + (high - low) * torch.rand(STEP_TOKENS // length, generator=generator)).exp().long()
    return make_rows(distances, length, generator)


def learning_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, constant, linear decay."""
    return rate * min(1, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@torch.inference_mode()
def accuracy(logits: Callable[[Tensor], Tensor], distance: int) -> float:
    """Return the share of the keys of second copies whose most probable token is the right one."""
    generator = torch.Generator().manual_seed(distance)
    length = distance + min(distance, SEGMENT) - 1
    tokens, targets = make_rows(torch.full((ROWS,), distance), length, generator)
    hits = torch.cat([logits(part[:, :-1]).argmax(-1) for part in tokens.split(11)]) == targets
    return hits[targets != UNSCORED].double().mean().item()


def train(
    model: nn.Module,
    rate: float,
    seed: int,
    stages: Sequence[tuple[int, int]],
    predict: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """Train a model; returns the loss by step, in nats a scored token.

    Args:
        stages: the same as STAGES.
        predict: the model's logits of the keys and fillers, for tokens of the task, where the model has other tokens
            too, or None for the model itself.
    """
    optimiser, generator = make_optimiser(model, rate), torch.Generator().manual_seed(seed)
    lengths = [length for steps, length in stages for _ in range(steps)]
    losses = []
    for step, length in enumerate(lengths):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(rate, step, len(lengths))
        tokens, targets = training_rows(length, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = (predict or model)(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        losses.append(loss.item())
    return losses


def run(model_arguments: list[str], rate: str, seed: int, stages: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Train a model and evaluate it.

    Args:
        stages: the same as STAGES.

    Returns:
        `parameters`, `kv_bytes_per_token` and `kv_bytes_per_sequence` (bf16), `seconds` of CPU time, `loss` by step in
        nats a scored token, and `accuracy` by distance.
    """
    args = parse([*SIZES, *model_arguments, "--seed", str(seed), "--lr", rate, "--out", "unused"])
    model = make_model(args, KEYS + FILLERS)
    started = time.process_time()
    losses = train(model, args.lr, seed, stages)
    per_token, per_sequence = kv_bytes(model)
    return {
        "parameters": count_parameters(model),
        "kv_bytes_per_token": per_token,
        "kv_bytes_per_sequence": per_sequence,
        "seconds": time.process_time() - started,
        "loss": losses,
        "accuracy": {distance: accuracy(model.eval(), distance) for distance in DISTANCES},
    }
