"""`starling calibrate`: gated models against explicit masks, scores against the divergence, and the command."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from starling.attention_backends.star.model_heads import checkpoint_digest
from starling.config.head_scores import read_scores
from starling.engine_ext.serving.cli.main import main
from starling.lab.calibration import calibrate
from starling.lab.calibration.gated_model import Case, GatedModel, ScoredPrompt, layers_of, make_plan
from starling.lab.models import ModelError, kl_at_each
from tests.parity.harness import reference_scores
from tests.unit.masks import mask_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = tuple(torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist())
PROMPT = ScoredPrompt("a", IDS, (5, 6, 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def model(folder) -> GatedModel:
    return GatedModel(folder, "cpu", torch.float32)


def gates_of(heads) -> torch.Tensor:
    gates = torch.zeros(2, 2)
    for layer, head in heads:
        gates[layer, head] = 1
    return gates


@pytest.mark.parametrize("heads", [(), [(0, 1)], [(1, 0), (1, 1)], list(product(range(2), range(2)))], ids=str)
def test_gates_of_0_and_1_are_star_with_dense_heads(folder, model, heads):
    plan = make_plan(len(IDS), 4, 50)
    assert (plan.block_size, plan.context_end, plan.overlap_size > 0) == (64, 250, True)
    expected = reference_scores(folder, list(IDS), mask_of(plan, len(IDS)), dense_heads=heads)
    got = model.log_probs(IDS, len(IDS), gates_of(heads), plan)
    torch.testing.assert_close(got[:-1], expected, rtol=0, atol=1e-4)
    mixed = torch.full((2, 2), 1e-12) + gates_of(heads) * (1 - 2e-12)  # computed as a mixture
    torch.testing.assert_close(model.log_probs(IDS, len(IDS), mixed, plan), got, rtol=0, atol=1e-4)


def test_the_scores_of_a_prompt_sum_to_its_divergence(model):
    case = Case(model, PROMPT, 4, 50)
    scores = case.scores(24)
    whole = float(case.divergence(torch.zeros(2, 2)))
    assert whole > 1e-4
    assert scores.sum().item() == pytest.approx(whole, rel=0.02)
    order = [(0, 0), (1, 1), (0, 1), (1, 0)]
    none, some, every = case.divergences(order, [0, 2, 4])
    assert none == pytest.approx(whole, rel=1e-4)
    assert some == pytest.approx(float(case.divergence(gates_of(order[:2]))), rel=1e-4)
    assert abs(every) < 1e-6


def test_a_divergence_is_the_mean_kl_of_its_places():
    dense, other = (torch.tensor(values).log_softmax(-1) for values in ([[0.0, 1.0], [2.0, 0.0]], [[0.0, 0.0]] * 2))
    expected = torch.nn.functional.kl_div(other, dense, log_target=True, reduction="batchmean")
    assert float(kl_at_each(dense, other).mean()) == pytest.approx(float(expected))


def test_a_prompt_without_an_answer_is_scored_at_the_models_own(model):
    case = Case(model, ScoredPrompt("a", IDS, ()), 4, 50)
    assert len(case.ids) == len(IDS) + 3
    for index in range(3):
        assert case.dense[index].argmax() == case.ids[len(IDS) + index]


def test_the_passes_of_a_gradient_keep_the_inputs_of_layers_alone(model):
    """The activations of a layer are computed again in the backward pass."""
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    gates = torch.full((2, 2), 0.5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.log_probs(IDS, 1, gates, make_plan(len(IDS), 4, 50))
    assert max(kept) <= max(300 * 64, 320 * 64)


def run(folder, out, *arguments: str) -> int:
    settings = ["--lengths", "1200", "--prompts-per-cell", "1", "--prompt-format", "text", "--steps", "1"]
    return main(["calibrate", str(folder), "--out", str(out), *settings, "--blocks", "4", *arguments])


def test_the_command_writes_a_file_that_a_server_reads(folder, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert run(folder, out, "--tasks", "nth_note,fwe") == 0
    scores = read_scores(str(out))
    assert [len(row) for row in scores.scores] == [2, 2]
    assert scores.checkpoint == checkpoint_digest(folder)
    assert scores.setup["tasks"] == ["fwe", "nth_note"]
    assert scores.curve[0][0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    shown = capsys.readouterr().out
    assert "4 KV heads; a tenth of them carry" in shown
    assert f"written: {out}" in shown.replace("\n", "")


def test_an_interrupted_command_goes_on_from_there(folder, tmp_path, monkeypatch, capsys):
    out, scored = tmp_path / "scores.json", []
    scores_of = Case.scores

    def interrupted(self, steps):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(scores_of(self, steps))
        return scored[-1]

    monkeypatch.setattr(Case, "scores", interrupted)
    assert run(folder, out, "--tasks", "nth_note,fwe", "--curve-prompts", "0") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    part = json.loads(calibrate.part_of(out).read_text())["values"]["scores"]
    assert len(part) == 1
    monkeypatch.setattr(Case, "scores", lambda self, steps: scored[0])
    assert run(folder, out, "--tasks", "fwe", "--curve-prompts", "0") == 2
    assert "has scores of another model or other options" in capsys.readouterr().err
    assert run(folder, out, "--tasks", "nth_note,fwe", "--curve-prompts", "0") == 0
    expected = [[float(f"{score:.4g}") for score in row] for row in scored[0].tolist()]
    assert [list(row) for row in read_scores(str(out)).scores] == expected
    assert read_scores(str(out)).curve == ()


def test_what_has_no_finite_score_is_refused_at_its_prompt(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Case, "scores", lambda self, steps: torch.full((2, 2), torch.nan))
    assert run(folder, tmp_path / "scores.json", "--tasks", "fwe") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "the prompt fwe/1200/0 can't be scored: in float32 its results are not finite numbers" in message
    monkeypatch.setattr(Case, "scores", lambda self, steps: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(folder, tmp_path / "scores.json", "--tasks", "fwe") == 130
    assert "Nothing is scored." in capsys.readouterr().err


def test_the_users_own_prompts(folder, tmp_path):
    prompts, out = tmp_path / "mine.jsonl", tmp_path / "scores.json"
    prompts.write_text(json.dumps({"prompt": "abc " * 100}) + "\n" + json.dumps({"prompt": "b" * 300, "answer": "yes"}))
    assert main(["calibrate", str(folder), "--out", str(out), "--prompts", str(prompts), "--steps", "1"]) == 0
    scores = read_scores(str(out))
    assert "prompts_sha256" in scores.setup
    assert len(scores.curve) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "none"], "tasks='none' is refused: there is no such task"),
        (["--device", "tpu"], "device='tpu' is refused"),
        (["--blocks", "1"], "blocks=1 is refused"),
        (["--lengths", "256", "--tasks", "code"], "too short for the task"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, tmp_path, arguments, message, capsys):
    assert run(folder, tmp_path / "scores.json", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_or_that_transformers_cannot_load_is_refused(tmp_path, capsys):
    assert main(["calibrate", str(tmp_path / "nothing"), "--out", str(tmp_path / "scores.json")]) == 2
    assert "it is no folder, and the hub's cache has no such model" in capsys.readouterr().err
    with pytest.raises(ModelError, match="can't be loaded by Transformers"):
        GatedModel(tmp_path, "cpu", torch.float32)


def test_the_folder_of_the_file_must_exist(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "nowhere" / "scores.json") == 2
    assert "the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 4}, ([True, True], 4)),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}, ([True], 2)),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "multi_query": True}, ([True], 1)),
        ({"layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 4}, ([False, True], 4)),
        ({"layer_types": ["hybrid"], "num_attention_heads": 4}, None),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "sliding_window": 128}, None),
    ],
)
def test_the_layers_of_a_model_are_those_of_its_configuration(fields, found):
    text = SimpleNamespace(**fields)
    config = SimpleNamespace(get_text_config=lambda: text)
    if found is None:
        with pytest.raises(ModelError, match="the model has no layers of full attention, but"):
            layers_of(config)
    else:
        assert layers_of(config) == found
