"""What Starling reads and changes of vLLM's model runners."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from starling.vllm_compat import worker
from starling.vllm_compat.worker import (
    attention_backends,
    batch_request_ids,
    keep_request_ids,
    metadata_builders,
    without_discarded_generators,
)
from tests.model_runners import HAS_V1


class SecondRunner:
    """The V2 model runner, as far as it matters here."""

    def prepare_attn(self, input_batch):
        return len(input_batch.req_ids)


def test_requests_of_a_batchs_rows():
    first = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b"]))
    keep_request_ids(first)
    assert batch_request_ids(first) == ["a", "b"]
    second = SecondRunner()
    keep_request_ids(second)
    assert second.prepare_attn(SimpleNamespace(req_ids=["b", "a"])) == 2
    assert batch_request_ids(second) == ["b", "a"]


def runner(device: str) -> SimpleNamespace:
    return SimpleNamespace(
        input_batch=SimpleNamespace(generators={0: "one", 2: "three"}),
        discard_request_mask=SimpleNamespace(np=np.array([True, False, False])),
        device=torch.device(device),
    )


def test_rows_whose_sample_is_discarded_have_no_generator_meanwhile():
    on_cpu = runner("cpu")
    with pytest.raises(KeyError), without_discarded_generators(on_cpu):
        assert on_cpu.input_batch.generators == {2: "three"}
        raise KeyError
    assert on_cpu.input_batch.generators == {0: "one", 2: "three"}
    on_gpu = runner("cuda")
    with without_discarded_generators(on_gpu):
        assert on_gpu.input_batch.generators == {0: "one", 2: "three"}
    with without_discarded_generators(SimpleNamespace()):
        """The V2 runner has no such mask."""


@pytest.mark.skipif(not HAS_V1, reason="vLLM has no model runner V1")
def test_vllm_still_rewinds_the_generators_of_discarded_rows():
    """Fails when without_discarded_generators can go."""
    from vllm.v1.worker import gpu_model_runner

    assert "set_offset" in inspect.getsource(gpu_model_runner)


def test_attention_groups_of_a_runner():
    def group(name: str) -> SimpleNamespace:
        backend = SimpleNamespace(get_name=lambda: name)
        return SimpleNamespace(
            backend=backend, layer_names=[name.lower()], get_metadata_builder=lambda index: (name, index)
        )

    made = SimpleNamespace(attn_groups=[[group("B"), group("A")], [group("B")]])
    assert attention_backends(SimpleNamespace(model_runner=made)) == ["A", "B"]
    assert metadata_builders(made) == [(("B", 0), ["b"]), (("A", 0), ["a"]), (("B", 0), ["b"])]


def test_names_of_shared_memory_are_removed_where_every_rank_of_the_group_has_it(tmp_path, monkeypatch):
    kept = ["vllm_dist_1-tp:0-[2-3]-cpushm_2", "vllm_dist_12-tp:0-[0-1]-cpushm_0", "psm_1"]
    for name in [*kept, "vllm_dist_1-tp:0-[0-1]-cpushm_0", "vllm_dist_1-tp:0-[0-1]-cpushm_1"]:
        (tmp_path / name).touch()
    monkeypatch.setattr(worker, "SHARED_MEMORY", tmp_path)
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)
    worker.unlink_shared_memory(1)
    assert len(list(tmp_path.iterdir())) == 5
    monkeypatch.setenv("VLLM_DIST_IDENT", "vllm_dist_1")
    for _ in range(2):  # each rank does
        worker.unlink_shared_memory(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
