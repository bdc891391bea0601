"""The scores of an engine's model: which file they come from, what is refused, and which heads a rank has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from starling.attention_backends.star import model_heads
from starling.attention_backends.star.model_heads import (
    check_shape,
    checkpoint_digest,
    checkpoint_folder,
    ranks_of_layers,
    scores_of,
)
from starling.config.head_scores import HeadScores, ScoresError
from starling.config.parsing import OptionError

SCORES = [[0.1, 0.9, 0.2, 0.8], [], [0.7, 0.6, 0.5, 0.4]]


@pytest.fixture(autouse=True)
def nothing_found_before():
    model_heads._scores_of.cache_clear()


@pytest.fixture
def model(tmp_path):
    """A folder with weights in two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        content = np.random.default_rng(number).integers(0, 256, 100_000, dtype=np.uint8)
        (folder / f"model-{number}.safetensors").write_bytes(content.tobytes())
    return folder


def config_of(model, heads: str | None = None, layers: int = 3, kv_heads: int = 4):
    model_config = SimpleNamespace(
        model=str(model),
        revision=None,
        get_total_num_hidden_layers=lambda: layers,
        get_total_num_kv_heads=lambda: kv_heads,
    )
    entry = {} if heads is None else {"star_heads": heads}
    return SimpleNamespace(model_config=model_config, additional_config={"starling": entry})


def write(path, **fields) -> str:
    path.write_text(json.dumps({"scores": SCORES} | fields))
    return str(path)


def test_a_digest_is_that_of_the_weights(model):
    before = checkpoint_digest(model)
    (model / "config.json").write_text('{"other": 1}')
    assert checkpoint_digest(model) == before
    path = model / "model-2.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert checkpoint_digest(model) != before
    path.unlink()
    assert checkpoint_digest(model) not in (before, None)
    (model / "model-1.safetensors").unlink()
    assert checkpoint_digest(model) is None


def test_a_model_is_a_folder_or_in_the_cache_of_the_hub(model, tmp_path):
    assert checkpoint_folder(str(model), None) == model
    assert checkpoint_folder("nobody/nothing", None) is None
    assert checkpoint_folder(str(tmp_path / "no folder"), None) is None


def test_scores_that_come_with_starling_are_found_by_the_weights(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_heads, "KNOWN", tmp_path)
    write(tmp_path / "a.json", checkpoint="another")
    assert scores_of(config_of(model)) is None
    model_heads._scores_of.cache_clear()
    write(tmp_path / "b.json", checkpoint=checkpoint_digest(model))
    assert scores_of(config_of(model)).num_heads == 8


def test_a_file_without_a_digest_is_taken_for_any_model_of_its_shape(model, tmp_path):
    assert scores_of(config_of(model, write(tmp_path / "scores.json"))).num_heads == 8


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"checkpoint": "another", "model": "m"}, {}, "the scores are those of m, with other weights than"),
        ({}, {"layers": 4}, "it has scores of 3 layers, and the model has 4"),
        ({}, {"kv_heads": 2}, "layer 0 has 4 scores, and the model has 2 KV heads a layer"),
    ],
)
def test_scores_of_another_model_are_refused(model, tmp_path, fields, sizes, message):
    config = config_of(model, write(tmp_path / "scores.json", **fields), **sizes)
    with pytest.raises(OptionError, match=rf"^starling.star_heads=.* is refused: {message}"):
        scores_of(config)


def test_a_file_that_is_not_there_is_refused(model, tmp_path):
    with pytest.raises(OptionError, match=r"star_heads=.*: the file can't be read: .*No such file"):
        scores_of(config_of(model, str(tmp_path / "nothing.json")))


def test_an_engine_without_starling_has_no_scores(model):
    config = config_of(model)
    config.additional_config = {}
    assert scores_of(config) is None


def fake_layers(monkeypatch, heads: int, rank: int, size: int) -> torch.nn.Module:
    blocks = {
        f"model.layers.{i}.self_attn.attn": SimpleNamespace(attention=SimpleNamespace(num_kv_heads=heads))
        for i in (0, 2)
    }
    monkeypatch.setattr(model_heads, "attention_blocks", lambda model: blocks)
    monkeypatch.setattr(model_heads, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(model_heads, "get_tensor_model_parallel_world_size", lambda: size)
    return torch.nn.Module()


@pytest.mark.parametrize(
    ("rank", "size", "expected"),
    [
        (0, 1, [[7, 0, 6, 1], [2, 3, 4, 5]]),
        (1, 2, [[6, 1], [4, 5]]),
        (3, 4, [[1], [5]]),
        (5, 8, [[6], [4]]),  # each head is on two ranks
    ],
)
def test_each_rank_has_the_places_of_its_own_heads(monkeypatch, rank, size, expected):
    model = fake_layers(monkeypatch, max(1, 4 // size), rank, size)
    names = [f"model.layers.{i}.self_attn.attn" for i in (0, 2)]
    ranks, problem = ranks_of_layers(HeadScores(scores=SCORES), model, [*names, "model.layers.3.of_a_drafter"])
    assert problem is None
    assert [ranks[name].tolist() for name in names] == expected


def test_layers_that_do_not_fit_the_scores_are_a_problem(monkeypatch):
    model = fake_layers(monkeypatch, 2, 0, 1)
    _, problem = ranks_of_layers(HeadScores(scores=SCORES), model, ["model.layers.0.self_attn.attn"])
    assert problem == "layer model.layers.0.self_attn.attn has 2 KV heads on each of 1 ranks, and 4 scores"
    scores = HeadScores(scores=[[], [], []])
    _, problem = ranks_of_layers(scores, model, ["model.layers.0.self_attn.attn"])
    assert problem == "layer model.layers.0.self_attn.attn is full attention, and has no scores"
    names = ["model.layers.0.self_attn.attn"], ["model.layers.2.self_attn.attn"]
    _, problem = ranks_of_layers(HeadScores(scores=[[1, 2], [], [3, 4]]), model, *names)
    assert problem == "layer model.layers.2.self_attn.attn is not full attention, and has its own scores"


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "has_curve"),
    [("smollm2-135m-instruct", 30, 3, True), ("qwen2.5-coder-0.5b-instruct", 24, 2, False)],
)
def test_the_scores_that_come_with_starling_are_of_their_models_shape(name, layers, kv_heads, has_curve):
    scores = HeadScores.model_validate_json((model_heads.KNOWN / f"{name}.json").read_text())
    check_shape(scores, layers, kv_heads)
    assert scores.num_heads == layers * kv_heads
    assert scores.checkpoint
    assert sum(scores.scores[layer][head] for layer, head in scores.order[: scores.count(0.1)]) > 0
    assert bool(scores.curve) == has_curve
    if has_curve:
        assert min(value for _, value in scores.curve) < scores.curve[0][1]


def test_the_files_of_an_index_are_those_of_the_model(model):
    """A second set of the same weights beside them, as some models have it, changes nothing."""
    before = checkpoint_digest(model)
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (model / "model-3.safetensors").write_bytes(b"other")
    (model / "consolidated.safetensors").write_bytes(b"other")
    assert checkpoint_digest(model) == before


def test_scores_of_uneven_layers_are_refused():
    with pytest.raises(ScoresError, match="layer 1 has 1 scores, and the model has 2"):
        check_shape(HeadScores(scores=[[1, 2], [1]]), 2, 2)


def test_the_docs_say_how_much_of_the_weights_the_digest_covers():
    page = (Path(__file__).parents[3] / "docs" / "dense-heads.md").read_text(encoding="utf-8")
    assert f"{model_heads.SAMPLES} pieces of {model_heads.SAMPLE_BYTES // 1024} KiB" in page
