"""`benchmarks.attamba.quality`: what it measures of a model, its intervals, and a whole tiny grid, interrupted."""

from __future__ import annotations

import json
import math
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from benchmarks.attamba import measures, quality
from examples.recall import DISTANCES
from examples.stdlib_text import Text

VOCABULARY = 2000
TINY = ["--dim", "16", "--heads", "4", "--ffn", "24", "--ssm-inner", "8", "--ssm-state", "4", "--ssm-heads", "2"]
TINY += ["--length", "700", "--batch", "1", "--windows", "3", "--recall", "0.5", "--dtype", "float32"]


def make_text() -> Text:
    stream = torch.randint(256, (6000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    return Text(stream[:3000], stream[3000:], "made up", torch.full((VOCABULARY,), 2))


@pytest.fixture(scope="module")
def text() -> Text:
    return make_text()


def copy_last(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of a model that expects what followed the last earlier occurrence of the token, at most ``size`` back."""
    position = torch.arange(tokens.shape[1])
    back = position[:, None] - position
    same = (tokens[:, :, None] == tokens[:, None]) & (back > 0) & (back <= size)
    last = (same * (position + 1)).amax(-1)  # the position after the occurrence, 0 for none
    return one_hot(tokens.gather(1, last), VOCABULARY).float()


def test_recall_counts_the_hits_of_a_model_that_sees_100_tokens_back():
    hits = measures.recall_hits(lambda tokens: copy_last(tokens, 100), VOCABULARY)
    accuracy = {distance: hit.double().mean().item() for distance, hit in hits.items()}
    assert accuracy == {32: 1, 64: 1, 128: 0, 256: 0, 512: 0}
    assert all(3900 < len(hit) <= 4096 for hit in hits.values())


def test_bits_of_tokens_in_shorter_sequences(text, monkeypatch):
    """A model with 1 bit less for each doubling of the position shows what context gains."""

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


def test_the_learning_rate_with_the_fewest_bits_is_chosen():
    assert quality.choose_rate({"1e-3": 2.0, "2e-3": 1.9, "4e-3": 1.95}) == "2e-3"


class InThisProcess(Executor):
    """Runs each call at once. The fourth call fails, as if the process had been stopped."""

    def __init__(self, fails: bool) -> None:
        self.calls, self.fails = 0, fails

    def submit(self, function, *args):  # type: ignore[override]
        self.calls += 1
        if self.fails and self.calls == 4:
            raise KeyboardInterrupt
        done: Future = Future()
        done.set_result(function(*args))
        return done


def test_a_grid_goes_on_where_it_stopped_and_gives_tables(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(quality, "COMMON", TINY)
    monkeypatch.setattr(quality, "STEPS", 3)
    monkeypatch.setattr(quality, "SWEEP_STEPS", 1)
    monkeypatch.setattr(quality, "RATES", ("1e-3", "2e-3"))
    monkeypatch.setattr(quality, "load_package_text", lambda: text)
    models, seeds = ["transformer", "attamba-p4-l32"], [0, 1]
    progress = quality.Progress(models, seeds, dict.fromkeys(models, 60.0))
    assert str(progress).startswith("0 of 16 steps, 0 CPU minutes of training, about 16 left")

    with pytest.raises(KeyboardInterrupt):
        quality.run_all(quality.sweep(models), InThisProcess(fails=True), progress)
    assert sum(map(quality.is_done, quality.sweep(models))) == 3
    workers, progress = InThisProcess(fails=False), quality.Progress(models, seeds, dict.fromkeys(models, 60.0))
    quality.run_all(quality.sweep(models), workers, progress)
    assert workers.calls == 1
    jobs = quality.grid(models, seeds)
    assert [(job.model, job.seed) for job in jobs] == [(model, seed) for seed in seeds for model in models]
    quality.run_all(jobs, workers, progress)
    assert workers.calls == 5
    assert "16 of 16 steps" in capsys.readouterr().out and str(progress).endswith("about 0 left")

    result = json.loads(json.dumps(quality.collect(jobs)))
    for model, row in result["models"].items():
        assert row["learning_rate"] == float(quality.choose_rate(result["sweep"][model]))
        assert len(row["bits_per_byte"]) == 2
        # Untrained models, of tokens of two bytes each.
        assert all(5 < bits < 8 for bits in [*row["bits_per_byte"].values(), *row["by_position"].values()])
        assert list(map(int, row["recall"])) == list(DISTANCES)
    assert list(result["bits_ratio"]) == ["attamba-p4-l32 over transformer"]
    assert abs(result["bits_ratio"]["attamba-p4-l32 over transformer"]["0 to 699"]["mean"] - 1) < 0.3
    printed = quality.tables(result)
    assert printed.count("| attamba-p4-l32 |") == 3 and printed.count("| attamba-p4-l32 over transformer |") == 5
    quality.plot(result, quality.BASELINE, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_all_models_of_the_grid_have_as_many_parameters(tmp_path):
    counts = []
    for name in quality.MODELS:
        args = quality.Job(name, "1e-3", 0, 1).arguments()
        model = quality.make_model(args, quality.VOCABULARY)
        counts.append(sum(weight.numel() for weight in model.parameters()))
    assert max(counts) < 1.005 * min(counts)
