"""The merge of partial outputs: exact for any split of the keys, and equal to vLLM's merge of two."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from starling.attention_backends.kernels.merge import merge, merge_rows
from starling.attention_backends.kernels.reference import masked_attention
from tests.kernels.determinism import OnlyDeterministic

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


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_parts_merged_into_their_tokens_give_the_whole(data):
    """Keys are assigned to up to five parts, some without keys, of which the first is merged in place already."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    offset = data.draw(st.sampled_from([0.0, 1000.0, -1000.0]))
    keys, parts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    tokens = st.lists(st.integers(0, parts), min_size=keys, max_size=keys)
    owner = torch.tensor([data.draw(tokens) for _ in range(3)])  # of each token and key; the last part is left out
    query, key, value = (torch.randn(size, 2, 8, dtype=torch.float64) * 3 for size in (3, keys, keys))
    found = [masked_attention(query, key, value, owner == part, 1.0) for part in range(parts)]
    whole, whole_lse = masked_attention(query, key, value, owner < parts, 1.0)
    out, lse = found[0][0].float(), (found[0][1] + offset).float()
    pairs = data.draw(st.permutations([(part, token) for part in range(1, parts) for token in range(3)]))
    pairs = [(part, token) for part, token in pairs if (owner[token] == part).any() or data.draw(st.booleans())]
    if pairs:
        part, token = torch.tensor(pairs).T
        outs, lses = (torch.stack([one[index] for one in found]) for index in (0, 1))
        merge_rows(out, lse, token, outs[part, token].float(), (lses[part, token] + offset).float())
    torch.testing.assert_close(out, whole.float(), rtol=1e-3, atol=1e-3 if offset else 1e-5)
    torch.testing.assert_close(lse, (whole_lse + offset).float(), rtol=1e-6, atol=1e-5)


def test_parts_of_tokens_are_merged_as_stacked_parts_are():
    """Tokens with one, two and no further part; a part of no keys; a token that has no keys at all."""
    torch.manual_seed(0)
    out, lse, parts, part_lses = torch.randn(4, 3, 8), torch.randn(4, 3), torch.randn(5, 3, 8), torch.randn(5, 3)
    tokens = torch.tensor([2, 0, 2, 3, 3])
    lse[3], part_lses[3:], part_lses[1, 1], out[3], parts[3:] = -INF, -INF, -INF, 0, 0
    stacked, logs = torch.zeros(3, 4, 3, 8), torch.full((3, 4, 3), -INF)
    stacked[0], logs[0] = out, lse
    for place, (part, token) in zip((1, 1, 2, 1, 2), enumerate(tokens.tolist()), strict=True):
        stacked[place, token], logs[place, token] = parts[part], part_lses[part]
    expected, expected_lse = merge(stacked, logs)
    merge_rows(out, lse, tokens, parts, part_lses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert (out[3] == 0).all() and (lse[3] == -INF).all()


def test_no_parts_leave_the_tokens_as_they_are():
    out, lse = torch.randn(2, 1, 4), torch.tensor([[3.0], [-INF]])
    out[1] = 0
    before = out.clone()
    merge_rows(out, lse, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 4), torch.zeros(0, 1))
    torch.testing.assert_close(out, before)
    assert lse.tolist() == [[3.0], [-INF]]


def test_low_precision_parts_are_summed_in_float32():
    torch.manual_seed(0)
    parts = torch.randn(9, 2, 16).bfloat16()
    out, lse = parts[0].float()[None], torch.zeros(1, 2)
    merge_rows(out, lse, torch.zeros(8, dtype=torch.int64), parts[1:], torch.zeros(8, 2))
    torch.testing.assert_close(out[0], parts.double().mean(0).float())


def test_the_merge_of_a_cpu_would_not_be_deterministic_on_a_gpu():
    """So the check under which tests/gpu_contract runs the merge of a GPU can fail."""
    with OnlyDeterministic(), pytest.raises(RuntimeError, match=r"index_add_\.default may have another result"):
        merge_rows(torch.zeros(1, 2, 4), torch.zeros(1, 2), torch.zeros(3).long(), *partial(3))


def partial(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(parts, 2, 4), torch.randn(parts, 2)
