"""`benchmarks.attamba.quality`: what it measures of a model, its intervals, and a whole tiny grid, interrupted."""

from __future__ import annotations

import json
import math
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from benchmarks.attamba import measures, quality, recall
from examples.stdlib_text import Text
from examples.train_attamba import make_model, parse

VOCABULARY = 300
TINY = ["--dim", "16", "--heads", "4", "--ffn", "24", "--ssm-inner", "8", "--ssm-state", "4", "--ssm-heads", "2"]
TINY_TEXT = [*TINY, "--length", "700", "--batch", "1", "--windows", "3", "--dtype", "float32"]


def make_text() -> Text:
    """Bytes, and identifiers from VOCABULARY on."""
    stream = torch.randint(400, (6000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    stream[(stream >= 256) & (stream < VOCABULARY)] = 7
    return Text(stream[:3000], stream[3000:], "made up", torch.full((VOCABULARY,), 2), syllables=44)


@pytest.fixture(scope="module")
def text() -> Text:
    return make_text()


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


@pytest.mark.parametrize("distance", [9, 32, 50])
def test_a_row_repeats_its_keys_and_scores_what_the_context_tells(distance):
    generator = torch.Generator().manual_seed(1)
    tokens, targets = recall.make_rows(torch.tensor([distance, 80]), 119, generator)
    assert (tokens.shape, targets.shape) == ((2, 120), (2, 119))
    keys = min(distance, recall.SEGMENT)
    first = tokens[0, :keys].tolist()
    assert len(set(first)) == keys and max(first) < recall.KEYS
    for start in range(distance, 120 - keys, distance):
        assert tokens[0, start : start + keys].tolist() == first
        scored = [*range(start + 1, start + keys)]
        assert targets[0, [position - 1 for position in scored]].tolist() == first[1:]
    fillers = tokens[0, keys:distance]
    assert ((fillers >= recall.KEYS) & (fillers < recall.KEYS + recall.FILLERS)).all()
    assert (targets[0, :distance] == recall.UNSCORED).all()
    assert (targets[0] != recall.UNSCORED).sum() == sum(
        position >= distance and 0 < position % distance < keys for position in range(120)
    )


def test_training_rows_have_distances_up_to_half_of_a_row():
    _, targets = recall.training_rows(64, torch.Generator().manual_seed(0))
    begins = (targets != recall.UNSCORED).int().argmax(1)  # the target of the second key of the second copy
    assert len(targets) == recall.STEP_TOKENS // 64
    assert begins.min() == recall.SHORTEST and 28 <= begins.max() <= 32


def test_a_run_learns_and_all_models_see_the_same_rows(monkeypatch):
    """Four keys and short rows are learned in seconds. The rows are compared by a sum of each."""
    monkeypatch.setattr(recall, "KEYS", 8)
    monkeypatch.setattr(recall, "SEGMENT", 4)
    monkeypatch.setattr(recall, "FILLERS", 2)
    monkeypatch.setattr(recall, "SHORTEST", 4)
    monkeypatch.setattr(recall, "STEP_TOKENS", 256)
    monkeypatch.setattr(recall, "WARMUP", 5)
    monkeypatch.setattr(recall, "DISTANCES", (4, 8))
    seen: list[int] = []
    made = recall.training_rows

    def watched(length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = made(length, generator)
        seen.append(int((tokens * torch.arange(tokens.numel()).view_as(tokens)).sum()))
        return tokens, targets

    monkeypatch.setattr(recall, "training_rows", watched)
    runs = [recall.run(quality.MODELS[name], "1e-2", 3, ((60, 16), (4, 32))) for name in ("attamba-p4-l1024", "isokv4")]
    assert seen[:64] == seen[64:] and len(set(seen)) == 64
    for result in runs:
        assert len(result["loss"]) == 64
        assert sum(result["loss"][-9:]) < 0.9 * sum(result["loss"][:9])
        assert set(result["accuracy"]) == {4, 8}


def test_the_learning_rate_of_the_recall_task():
    rates = [recall.learning_rate(2.0, step, 440) for step in range(440)]
    assert rates[0] == 2 / recall.WARMUP and rates[recall.WARMUP] == rates[300] == 2
    assert rates[-1] == pytest.approx(2 / 132) and rates == sorted(rates[:60]) + sorted(rates[60:], reverse=True)


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


def train_recall(arguments: list[str], rate: str, seed: int, stages: tuple) -> dict:
    """Stands for `recall.run`: the transformer recalls more, and the second learning rate is better."""
    accuracy = (0.9 if "transformer" in arguments else 0.6) + 0.01 * (seed % 3)
    loss = 1.0 if rate == "1e-3" else 0.5
    sizes = {"parameters": 9, "kv_bytes_per_token": 8.0, "kv_bytes_per_sequence": 7}
    return sizes | {"seconds": 60.0, "loss": [loss] * 30, "accuracy": dict.fromkeys(recall.DISTANCES, accuracy)}


def test_a_grid_goes_on_where_it_stopped_and_gives_tables(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(quality, "TEXT", TINY_TEXT)
    monkeypatch.setattr(quality, "TEXT_STEPS", 3)
    monkeypatch.setattr(recall, "STAGES", ((2, 64),))
    monkeypatch.setattr(recall, "STEP_TOKENS", 128)
    monkeypatch.setattr(quality, "TEXT_SWEEP_STEPS", 1)
    monkeypatch.setattr(quality, "RATES", dict.fromkeys(("recall", "text"), ("1e-3", "2e-3")))
    monkeypatch.setattr(quality, "load_package_text", lambda: text)
    monkeypatch.setattr(recall, "run", train_recall)
    models, seeds = ["transformer", "attamba-p4-l32"], [0, 1]
    result = {}
    for task, collect in (("recall", quality.collect_recall), ("text", quality.collect_text)):
        with pytest.raises(KeyboardInterrupt):
            quality.run_all(quality.sweep(task, models), InThisProcess(fails=True))
        assert sum(job.is_done() for job in quality.sweep(task, models)) == 3
        assert [job.model for job in quality.grid(task, models, [0])] == models[:1]  # the other's rate is not known
        workers = InThisProcess(fails=False)
        quality.run_all(quality.sweep(task, models), workers)
        assert workers.calls == 1
        jobs = quality.grid(task, models, seeds)
        assert [(job.model, job.seed) for job in jobs] == [(model, seed) for seed in seeds for model in models]
        quality.run_all(jobs[:3], workers)
        assert "done, 3 of 3 runs" in capsys.readouterr().out
        quality.run_all(jobs, workers)
        assert workers.calls == 5
        result[task] = collect(jobs)

    result = json.loads(json.dumps(result))
    row = result["recall"]["models"]["attamba-p4-l32"]
    assert row["learning_rate"] == "2e-3" and row["accuracy"]["64"]["by_seed"] == pytest.approx({"0": 0.6, "1": 0.61})
    difference = result["recall"]["differences"]["attamba-p4-l32 - transformer"]["512"]
    assert difference["over_seeds"] == pytest.approx([-0.3, -0.3])
    for model, row in result["text"]["models"].items():
        losses = result["text"]["sweep"][model]
        assert row["learning_rate"] == min(losses, key=losses.get)
        # Untrained models, of tokens of two bytes each.
        assert all(3 < bits["mean"] < 8 for bits in row["bits_per_byte"].values())
        assert list(row["context"]) == ["512 over 256", "700 over 512"]
    assert list(result["text"]["bits_ratio"]) == ["attamba-p4-l32 over transformer"]
    assert abs(result["text"]["bits_ratio"]["attamba-p4-l32 over transformer"]["0 to 699"]["mean"] - 1) < 0.3
    printed = quality.tables(result)
    assert printed.count("| attamba-p4-l32 |") == 3 and printed.count("| attamba-p4-l32 over transformer |") == 5
    assert "| attamba-p4-l32 - transformer | -0.30 (-0.30 to -0.30) |" in printed
    quality.plot(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert quality.tables({"recall": result["recall"]}) in printed


@pytest.mark.parametrize("vocabulary", [recall.KEYS + recall.FILLERS, 1024])
def test_all_models_of_the_grid_have_as_many_parameters(vocabulary):
    counts = []
    for arguments in quality.MODELS.values():
        model = make_model(parse([*recall.SIZES, *arguments, "--out", "unused"]), vocabulary)
        counts.append(sum(weight.numel() for weight in model.parameters()))
    assert max(counts) < 1.005 * min(counts)
