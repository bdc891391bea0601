"""Batches that are padded to the size of a CUDA graph, with the fields as vLLM's two model runners give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.rows import split_rows
from starling.scheduler.planning.plan import StarPlan
from tests.unit.attention_backends.test_rows import PAGE_SIZE, batch_metadata

PLAN = StarPlan(8, 8, 0, 30, 40)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_padding_rows_of_a_decode_graph_belong_to_no_request(runner):
    """A decode and a star chunk of one token in block 0, in a graph of four rows.

    V2 pads seq_lens, starts and block tables, but not is_prefilling and req_idx
    (vllm/v1/worker/gpu/model_states/default.py).
    """
    padding = 2 if runner == "V1" else 0
    fields = {
        "is_prefilling": torch.tensor([False, True] + [False] * padding),
        "req_idx": np.array([7, 3], dtype=np.intp) if runner == "V2" else None,
    }
    query_lens, seq_lens = [1, 1, 0, 0], [9, 1, 0, 0]
    common = batch_metadata(query_lens, seq_lens, columns=12, num_actual_tokens=4, **fields)
    virtual = virtual_metadata(common, split_rows([None, PLAN, None, None], query_lens, seq_lens, PAGE_SIZE))
    assert virtual.num_reqs == 4
    assert virtual.num_actual_tokens == 4
    assert virtual.query_start_loc.tolist() == [0, 1, 2, 2, 2]
    assert virtual.seq_lens.tolist() == seq_lens
    assert virtual.is_prefilling.tolist() == [False, True, False, False]
    if runner == "V2":
        assert virtual.req_idx.tolist() == [7, 3, -1, -1]
        assert virtual.req_idx.dtype == np.intp
    assert torch.equal(virtual.block_table_tensor, common.block_table_tensor)
