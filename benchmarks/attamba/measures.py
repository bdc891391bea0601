"""Measurements by `benchmarks.attamba.quality` of a trained checkpoint, and the intervals of comparisons."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.attamba_model import load_attamba
from examples.stdlib_text import Text
from examples.train_attamba import validation_windows
from starling.lab.statistics import mean_ratio

CONTEXTS, TAIL = (256, 512), 128
"""The last TAIL tokens of each window are also predicted from sequences of these lengths, to see what context gains."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % quantile of Student's t for this many seeds."""
Logits = Callable[[Tensor], Tensor]


def load_logits(path: Path) -> Logits:
    """Load the exported checkpoint as a function from tokens (B, T) to logits."""
    if json.loads((path / "config.json").read_text())["model_type"] == "attamba":
        return load_attamba(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return lambda tokens: model(tokens).logits


@torch.inference_mode()
def token_bits(logits: Logits, tokens: Tensor) -> Tensor:
    """Return (N, T) bits of each token of (N, T + 1) but the first."""
    losses = [
        F.cross_entropy(logits(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none") for part in tokens.split(8)
    ]
    return torch.cat(losses) / math.log(2)


def evaluate(path: Path, text: Text, count: int, length: int) -> dict[str, Tensor]:
    """Return all measures of a checkpoint on ``count`` validation windows of ``length`` tokens.

    Returns:
        `bytes` and `bits` (count, length) of each token; `context C` (count,), bits of the last TAIL tokens of each
        window in a sequence of C tokens.
    """
    logits, tokens = load_logits(path), validation_windows(text, count, length)
    found = {"bytes": text.token_bytes[tokens[:, 1:]], "bits": token_bits(logits, tokens)}
    for context in CONTEXTS:
        found[f"context {context}"] = token_bits(logits, tokens[:, -context - 1 :])[:, -TAIL:].sum(1)
    found[f"context {length}"] = found["bits"][:, -TAIL:].sum(1)
    return found


def spans(length: int) -> list[tuple[int, int]]:
    """Return parts of a sequence of ``length`` tokens, each [first, last), and last the whole."""
    return [*pairwise([0, length // 16, length // 4, length // 2, length]), (0, length)]


def span_bits(found: dict[str, Tensor], span: tuple[int, int]) -> Tensor:
    """Return (count,) bits of each window's tokens at the positions of ``span``."""
    return found["bits"][:, slice(*span)].double().sum(1)


def bits_per_byte(found: dict[str, Tensor], span: tuple[int, int]) -> float:
    return (span_bits(found, span).sum() / found["bytes"][:, slice(*span)].sum()).item()


def context_gains(runs: Sequence[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Return bits of the same tokens with a longer context over those with the next shorter one, by pair of lengths.

    Args:
        runs: results of `evaluate`, one a seed.

    Returns:
        [ratio, lower, upper]: the mean of the seeds, and a 95 % bootstrap interval over windows.
    """
    lengths = [*CONTEXTS, runs[0]["bits"].shape[1]]
    means = {length: torch.stack([run[f"context {length}"] for run in runs]).double().mean(0) for length in lengths}
    return {
        f"{longer} over {shorter}": mean_ratio(means[longer].numpy(), means[shorter].numpy())
        for shorter, longer in pairwise(lengths)
    }


def seeds_interval(values: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval [lower, upper] of the mean of one value a seed, by Student's t; None for one seed."""
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    return [mean - T_95[len(values)] * error, mean + T_95[len(values)] * error]


def compare(
    runs: dict[int, dict[str, Tensor]], others: dict[int, dict[str, Tensor]], span: tuple[int, int]
) -> dict[str, object]:
    """Return the bits of one model over those of another in a span, over the seeds that both have.

    Returns:
        `by_seed`; `mean`; `over_windows`, a 95 % bootstrap interval over validation windows of these seeds; and
        `over_seeds`, a 95 % interval over seeds. A difference is shown if both intervals exclude 1.
    """
    seeds = sorted(runs.keys() & others.keys())
    bits, baseline = (torch.stack([span_bits(of[seed], span) for seed in seeds]).numpy() for of in (runs, others))
    ratios = (bits.sum(1) / baseline.sum(1)).tolist()
    mean, lower, upper = mean_ratio(bits.mean(0), baseline.mean(0))
    return by_seed(dict(zip(seeds, ratios, strict=True))) | {"mean": mean, "over_windows": [lower, upper]}


def by_seed(values: dict[int, float]) -> dict[str, object]:
    """Return one value a seed, their `mean`, and its 95 % interval `over_seeds`."""
    listed = list(values.values())
    return {"by_seed": values, "mean": statistics.mean(listed), "over_seeds": seeds_interval(listed)}
