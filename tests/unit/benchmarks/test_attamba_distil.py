"""`benchmarks.attamba.distil`: mixers that start as K and V, and learn what attention to all keys adds."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attamba.distil import Student, Trainer
from benchmarks.attamba.from_transformer import Llama, Method, positive_direction
from tests.unit.benchmarks.test_attamba_from_transformer import llama  # noqa: F401

CHUNK, TOKENS = 4, 120


@pytest.fixture
def model(llama):  # noqa: F811
    return Llama(llama, torch.float32)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(256, (TOKENS + 1,), generator=torch.Generator().manual_seed(seed))


def test_mixers_start_as_the_projections_of_k_and_v(model):
    """For tokens with a positive gate: in a random model not all have one."""
    student, seen = Student(model, CHUNK, tokens(0)), []

    def compare(layer: int, x: torch.Tensor, added: torch.Tensor) -> None:
        good = x @ positive_direction(x) > 0
        assert good.float().mean() > 0.5
        for found, name in zip(student.keys_values(layer, x), ("k_proj", "v_proj"), strict=True):
            expected = model.project(x, layer, name)
            assert (found - expected)[:, good].norm() < 0.02 * expected[:, good].norm()
        assert torch.equal(model.attention(x, layer, Method(1)), added)
        seen.append(layer)

    model.bits(tokens(0), Method(1), compare)
    assert seen == [0, 1]


def test_each_layer_learns_what_attention_to_all_keys_adds(model):
    student = Student(model, CHUNK, tokens(0))
    trainer = Trainer(model, student, 30)
    for _ in range(30):
        trainer.train(tokens(0))
    first, last = torch.tensor(trainer.errors[0]), torch.tensor(trainer.errors[-1])
    assert (last < 0.9 * first).all(), (first, last)


def test_training_goes_on_where_it_was_stopped(model, tmp_path):
    whole, resumed = (Trainer(model, Student(model, CHUNK, tokens(0)), 4) for _ in range(2))
    with torch.no_grad():
        for one, other in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
            one.copy_(other)
    for step in range(4):
        whole.train(tokens(step))
        if step == 1:
            torch.save(whole.state(), tmp_path / "state.pt")
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in (2, 3):
        resumed.train(tokens(step))
    assert resumed.errors == whole.errors
    for one, other in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(one, other)
