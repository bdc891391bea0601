"""The digest of a model's weights."""

import pytest
import torch
from vllm.v1.worker.gpu_worker import Worker

from starling.features.library.worker import HARMLESS, may_change_weights, name_of, weights_digest


def model(seed: int = 0, bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=bias), torch.nn.Linear(96, 3))
    made.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.0)))
    made.register_parameter("empty", torch.nn.Parameter(torch.empty(0)))
    return made


def test_equal_weights_have_one_digest():
    assert weights_digest(model()) == weights_digest(model())


@torch.no_grad()
def change(made: torch.nn.Module, kind: str) -> torch.nn.Module:
    if kind == "a little training":
        made[1].weight.add_(torch.randn_like(made[1].weight) * 1e-5)
    elif kind == "dtype":
        made.bfloat16()
    elif kind == "a scalar":
        made.scale.add_(1)
    elif kind == "transposed":
        made[0].weight = torch.nn.Parameter(made[0].weight.T.contiguous())
    return made


@pytest.mark.parametrize("kind", ["a little training", "dtype", "a scalar", "transposed"])
def test_other_weights_have_another_digest(kind):
    assert weights_digest(change(model(), kind)) != weights_digest(model())


def test_a_missing_parameter_changes_the_digest():
    assert weights_digest(model(bias=False)) != weights_digest(model())


def test_the_order_in_memory_does_not_count():
    """A weight may be stored transposed; what it is counts."""
    made = model()
    made[0].weight = torch.nn.Parameter(made[0].weight.detach().T.contiguous().T)
    assert not made[0].weight.is_contiguous()
    assert weights_digest(made) == weights_digest(model())


@pytest.mark.parametrize(
    "method", ["reload_weights", "start_weight_update", "update_weights", "finish_weight_update", "reset_weights"]
)
def test_a_method_of_workers_may_change_the_weights(method):
    assert hasattr(Worker, method), "vLLM calls it otherwise now"
    assert may_change_weights(method)


def test_what_a_function_or_a_worker_extension_does_is_not_known():
    assert may_change_weights("my_own_update") and may_change_weights(lambda worker: None)
    assert name_of(lambda worker: None) == "a function of the caller's"


@pytest.mark.parametrize("method", sorted(HARMLESS))
def test_a_call_that_leaves_the_weights_as_they_are_is_known(method):
    assert hasattr(Worker, method), "vLLM has no such method any more"
    assert not may_change_weights(method)
