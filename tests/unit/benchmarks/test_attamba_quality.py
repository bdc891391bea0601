"""`benchmarks.attamba.quality`: what it measures of a model, its intervals, and the sizes that it compares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from benchmarks.attamba import measures, quality, recall
from examples.stdlib_text import Text
from examples.train_attamba import make_model, parse

VOCABULARY = 300


def copy_last(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of a model that expects what followed the last earlier occurrence of the token, at most ``size`` back."""
    position = torch.arange(tokens.shape[1])
    back = position[:, None] - position
    same = (tokens[:, :, None] == tokens[:, None]) & (back > 0) & (back <= size)
    last = (same * (position + 1)).amax(-1)  # the position after the occurrence, 0 for none
    return one_hot(tokens.gather(1, last), recall.KEYS + recall.FILLERS).float()


def test_recall_counts_the_hits_of_a_model_that_sees_100_tokens_back():
    found = {distance: recall.accuracy(lambda tokens: copy_last(tokens, 100), distance) for distance in (16, 64, 128)}
    assert found[16] == found[64] == 1
    assert found[128] < 0.05


def test_bits_of_tokens_in_shorter_sequences(monkeypatch):
    """A model with 1 bit less for each doubling of the position shows what context gains."""
    stream = torch.randint(256, (6000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    text = Text(stream[:3000], stream[3000:], "made up", torch.full((VOCABULARY,), 2), syllables=44)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        following = one_hot(tokens.roll(-1, 1), VOCABULARY).double()
        position = torch.arange(1, tokens.shape[1] + 1)[:, None].double()
        share = position / 1024  # the probability of the token that follows
        return following * torch.log(share) + (1 - following) * torch.log((1 - share) / (VOCABULARY - 1))

    monkeypatch.setattr(measures, "load_logits", lambda path: logits)
    found = measures.evaluate("unused", text, 5, 600)
    last = slice(-measures.TAIL, -1)  # the roll gives the last position a wrong token
    expected = -torch.log2(torch.arange(1, 601).double() / 1024)
    assert torch.allclose(found["bits"][:, last], expected[last].expand(5, -1), atol=1e-6)
    assert torch.equal(found["bytes"], torch.full((5, 600), 2))
    assert (found["context 256"] > found["context 512"]).all() and (found["context 512"] > found["context 600"]).all()
    gains = measures.context_gains([found])
    assert list(gains) == ["512 over 256", "600 over 512"]
    assert gains["512 over 256"][0] < gains["600 over 512"][0] < 1
    assert measures.bits_per_byte(found, (0, 599)) == pytest.approx(expected[:599].mean().item() / 2)


def made_up_runs(factor: float, noise: float, seeds: int) -> dict[int, dict[str, torch.Tensor]]:
    """Bits of windows of very different difficulty, of a model that has ``factor`` times the bits."""
    random = np.random.default_rng(5)
    windows = random.uniform(1, 9, (40, 1))
    return {
        seed: {"bits": torch.tensor(factor * (1 + noise * random.normal()) * windows * np.ones((1, 8)))}
        for seed in range(seeds)
    }


def test_a_comparison_is_paired_by_window_and_seed():
    alike = measures.compare(made_up_runs(1.02, 0, 3), made_up_runs(1, 0, 3), (0, 8))
    for bounds in (alike["over_windows"], alike["over_seeds"]):
        assert bounds == pytest.approx([1.02, 1.02])  # although the windows differ by nine times
    noisy = measures.compare(made_up_runs(1.02, 0.03, 3), made_up_runs(1, 0.0, 2), (0, 8))
    assert list(noisy["by_seed"]) == [0, 1]
    values = np.array(list(noisy["by_seed"].values()))
    width = 12.706 * values.std(ddof=1) / math.sqrt(2)
    assert noisy["over_seeds"] == pytest.approx([values.mean() - width, values.mean() + width])
    assert measures.compare(made_up_runs(1, 0, 1), made_up_runs(1, 0, 1), (0, 8))["over_seeds"] is None


@pytest.mark.parametrize("vocabulary", [recall.KEYS + recall.FILLERS, 1024])
def test_all_models_of_the_grid_have_as_many_parameters(vocabulary):
    counts = []
    for arguments in quality.MODELS.values():
        model = make_model(parse([*recall.SIZES, *arguments, "--out", "unused"]), vocabulary)
        counts.append(sum(weight.numel() for weight in model.parameters()))
    assert max(counts) < 1.005 * min(counts)
