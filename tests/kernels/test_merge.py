"""The merge of partial outputs: exact for any split of the keys, and equal to vLLM's merge of two."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from attention_backends.kernels.merge import merge
from attention_backends.kernels.reference import masked_attention

INF, NAN = float("inf"), float("nan")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_split_gives_the_whole(data):
    """Keys are assigned to up to five partials, some of which get none."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    keys, parts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, parts - 1), min_size=keys, max_size=keys)))
    query, key, value = (torch.randn(size, 2, 8, dtype=torch.float64) * 3 for size in (3, keys, keys))
    mask = torch.ones(3, keys, dtype=torch.bool)
    out, lse = masked_attention(query, key, value, mask, 1.0)
    partials = [masked_attention(query, key, value, mask & (owner == part), 1.0) for part in range(parts)]
    outs = torch.stack([torch.where(part_lse.isinf()[..., None], NAN, part_out) for part_out, part_lse in partials])
    merged, merged_lse = merge(outs, torch.stack([part_lse for _, part_lse in partials]))
    torch.testing.assert_close(merged, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", [-INF, INF])
def test_empty_partials(empty):
    """An empty partial has no effect, whatever its out holds. Empty partials alone give 0 and -inf."""
    outs = torch.tensor([[[[1.0, 2.0]]], [[[NAN, INF]]]])
    out, lse = merge(outs, torch.tensor([[[3.0]], [[empty]]]))
    assert out.tolist() == [[[1.0, 2.0]]] and lse.tolist() == [[3.0]]
    out, lse = merge(outs, torch.full((2, 1, 1), empty))
    assert out.tolist() == [[[0.0, 0.0]]] and lse.tolist() == [[-INF]]


def test_logs_far_from_zero():
    """Weights of e^1000 do not overflow, and weights of e^-1000 do not underflow."""
    outs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    for offset in (1000.0, -1000.0):
        out, lse = merge(outs, torch.full((2, 1, 1), offset))
        assert out.item() == 2.0 and lse.item() == pytest.approx(offset + 0.693147, rel=1e-6)


def test_low_precision_outs_are_summed_in_float32():
    outs = torch.randn(9, 4, 2, 16).bfloat16()
    out, lse = merge(outs, torch.zeros(9, 4, 2))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, outs.double().mean(0).float().bfloat16())


def test_vllms_merge_agrees():
    torch.manual_seed(0)
    outs, lses = torch.randn(2, 6, 4, 32), torch.randn(2, 6, 4) * 5
    lses[0, 0], lses[1, 1], lses[:, 2] = -INF, INF, -INF
    theirs, their_lse = torch.empty(6, 4, 32), torch.empty(4, 6)
    parts = [part for out, lse in zip(outs, lses, strict=True) for part in (out, lse.T.contiguous())]
    merge_attn_states(theirs, *parts, output_lse=their_lse)
    ours, our_lse = merge(outs, lses)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_lse, their_lse.T)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3, 2), (2, 3, 4)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\(P, \.\.\., D\) and \(P, \.\.\.\), P at least 1"):
        merge(torch.zeros(*shape[:1], 3, 2, 8), torch.zeros(shape))
