"""Attention of re-rotated queries, by the C++ op, and paged with torch, against attention over all keys in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.attention_backends.kernels.contract import Layout, Rotation
from starling.attention_backends.kernels.cpu import paged_op as cpu
from starling.attention_backends.kernels.dispatch import RerotatedQueries, add_rerotated_attention, rerotated_attention
from tests.kernels.cases import Case, cases

POSITIONS = 50
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["op", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def one_implementation(request, monkeypatch):
    """The op where a test asks for it, and fails where it is not built."""
    if request.node.callspec.params.get("implementation") == "torch":
        monkeypatch.setattr(cpu, "has_op_for", lambda operands: False)
    else:
        assert cpu.built_op() is not None


class Rerotated:
    """A case whose rows' query tokens are re-rotated tokens of a shorter query.

    Args:
        tokens: of each query token of the rows, its token of the query; each token of the query is there.
    """

    def __init__(self, case: Case, tokens: list[int], rotary_dim: int, is_neox_style: bool) -> None:
        self.case = dataclasses.replace(case, causal=False, queries_per_key=1, window=None)
        num_tokens = max(tokens) + 1
        tensors = self.case.tensors()
        query = tensors["query"][:num_tokens].clone()
        self.out = torch.full((*query.shape[:2], case.value_size), float("nan"), dtype=query.dtype)
        self.operands = self.case.operands(query=query, out=self.out)
        angles = torch.outer(torch.arange(POSITIONS), 0.6 ** torch.arange(rotary_dim // 2).double())
        self.rotation = Rotation(angles.cos().float(), angles.sin().float(), is_neox_style)
        self.rotate_by = torch.randint(POSITIONS, (len(tokens),))
        self.queries = RerotatedQueries(torch.tensor(tokens), self.rotate_by, self.rotation)
        self.angles = angles

    def rerotated_query(self, index: int) -> torch.Tensor:
        """(H, D) float64: a query token of the rows, by complex numbers."""
        query = self.operands.query[self.queries.tokens[index]].double()
        pairs = self.angles.shape[1]
        part = query[:, : 2 * pairs]
        part = part.unflatten(1, (2, -1)).mT if self.rotation.is_neox_style else part.unflatten(1, (-1, 2))
        back = torch.polar(torch.ones(pairs).double(), -self.angles[self.rotate_by[index]])
        found = torch.view_as_real(torch.view_as_complex(part.contiguous()) * back)
        found = (found.mT if self.rotation.is_neox_style else found).flatten(1)
        return torch.cat([found, query[:, 2 * pairs :]], 1)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse in float64, of each token over the keys of all its rows."""
        operands, page_size = self.operands, self.case.page_size
        num_tokens, heads = operands.query.shape[:2]
        scores = [[torch.zeros(heads, 0).double()] for _ in range(num_tokens)]
        values = [[torch.zeros(heads, 0, self.case.value_size).double()] for _ in range(num_tokens)]
        starts = operands.query_start_loc.tolist()
        for row, length in enumerate(self.case.seq_lens):
            pages = operands.block_table[row, : -(-length // page_size)].long()
            keys, row_values = (
                view[pages].flatten(0, 1)[:length].double().repeat_interleave(self.case.group, 1).transpose(0, 1)
                for view in (operands.keys, operands.values)
            )
            for index in range(starts[row], starts[row + 1]):
                found = (
                    torch.einsum("hd,hkd->hk", self.rerotated_query(index), keys) * operands.scale * operands.k_scale
                )
                if operands.softcap:
                    found = operands.softcap * torch.tanh(found / operands.softcap)
                token = int(self.queries.tokens[index])
                scores[token].append(found)
                values[token].append(row_values * operands.v_scale)
        outs, lses = [], []
        for token in range(num_tokens):
            all_scores = torch.cat(scores[token], 1)
            outs.append(torch.einsum("hk,hkd->hd", all_scores.softmax(1), torch.cat(values[token], 1)))
            lses.append(all_scores.logsumexp(1))
        return torch.stack(outs), torch.stack(lses)

    def check(self) -> None:
        exact, _ = self.exact()
        rerotated_attention(self.operands, self.queries)
        # As in test_attention.py, and once more the dtype's rounding, of the re-rotated query.
        limit = 10 * self.case.v_scale * max(torch.finfo(self.case.dtype).eps, 3e-6)
        torch.testing.assert_close(self.out.double(), exact, rtol=0, atol=limit)


@st.composite
def rerotated_cases(draw: st.DrawFn, dtype: torch.dtype) -> Rerotated:
    case = draw(cases(dtype=dtype))
    # Rows without keys are left to the test of merges: each token here has keys.
    rows = [(queries, max(keys, 1)) for queries, keys in zip(case.query_lens, case.seq_lens, strict=True)] + [(1, 3)]
    case = dataclasses.replace(case, query_lens=tuple(q for q, _ in rows), seq_lens=tuple(k for _, k in rows))
    count = sum(case.query_lens)
    num_tokens = draw(st.integers(1, count))
    more = draw(st.lists(st.integers(0, num_tokens - 1), min_size=count - num_tokens, max_size=count - num_tokens))
    tokens = draw(st.permutations([*range(num_tokens), *more]))
    rotary_dim = draw(st.sampled_from([8, 16, case.key_size]))
    return Rerotated(case, tokens, rotary_dim, draw(st.booleans()))


@DTYPES
@IMPLEMENTATIONS
def test_each_token_attends_to_the_keys_of_all_its_rows(implementation, dtype):
    @given(rerotated_cases(dtype))
    @settings(max_examples=25, deadline=None)
    def check(rerotated: Rerotated) -> None:
        rerotated.check()

    check()


LONG = Case((1, 1, 3, 1), (3000, 40, 700, 1), key_size=64, value_size=64, page_size=32, group=3)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("implementation", ["op"])
def test_long_rows_on_one_thread_and_two(implementation, dtype, threads):
    """On two threads, a row's keys are split, and their parts are merged with those of other rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Rerotated(dataclasses.replace(LONG, dtype=dtype), [0, 1, 0, 2, 1, 0], 64, True).check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("layout", Layout)
@IMPLEMENTATIONS
def test_fp8_caches(implementation, layout, cache_dtype):
    case = dataclasses.replace(LONG, cache_dtype=cache_dtype, layout=layout, k_scale=0.5, v_scale=2.0, softcap=3.0)
    Rerotated(case, [0, 1, 0, 2, 1, 0], 32, False).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@IMPLEMENTATIONS
def test_attention_is_added_to_that_over_other_keys(implementation, dtype):
    """Token 0 has other keys alone, token 1 both, token 2 its rows alone, token 3 no key at all."""
    case = Case((2, 1, 1), (90, 20, 0), group=2, dtype=dtype)
    rerotated = Rerotated(case, [1, 2, 1, 3], 16, True)
    other_out, other_lse = torch.randn(4, 4, 32), torch.randn(4, 4)
    other_out[2:], other_lse[2:] = 0, float("-inf")
    out, lse = other_out.clone(), other_lse.clone()
    add_rerotated_attention(dataclasses.replace(rerotated.operands, out=None), rerotated.queries, out, lse)
    exact, exact_lse = rerotated.exact()
    logs = torch.stack([exact_lse, other_lse.double()])
    weights = torch.exp(logs - logs.logsumexp(0))[:, :3]
    wanted = (weights[..., None] * torch.stack([exact.nan_to_num(), other_out.double()])[:, :3]).sum(0)
    limit = 10 * max(torch.finfo(dtype).eps, 3e-6)
    torch.testing.assert_close(out[:3].double(), wanted, rtol=0, atol=limit)
    torch.testing.assert_close(lse[:3].double(), logs.logsumexp(0)[:3], rtol=0, atol=limit)
    torch.testing.assert_close(out[0], other_out[0])
    assert not out[3].any() and bool((lse[3] == float("-inf")).all())


@pytest.mark.parametrize("implementation", ["op"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", 3, r"tokens\[1\] = 3: the query has 3 tokens"),
        ("tokens", -1, r"tokens\[1\] = -1"),
        ("rotate_by", POSITIONS, rf"rotate_by\[1\] = {POSITIONS}: the angles have {POSITIONS} positions"),
        ("rotate_by", -1, r"rotate_by\[1\] = -1"),
    ],
)
def test_values_that_lead_outside_of_the_operands(implementation, name, value, message):
    rerotated = Rerotated(LONG, [0, 1, 0, 2, 1, 0], 64, True)
    {"tokens": rerotated.queries.tokens, "rotate_by": rerotated.queries.rotate_by}[name][1] = value
    with pytest.raises(ValueError, match=message):
        rerotated_attention(rerotated.operands, rerotated.queries)


@pytest.mark.parametrize("implementation", ["op"])
def test_a_visible_nan_reaches_the_result(implementation):
    rerotated = Rerotated(LONG, [0, 1, 0, 2, 1, 0], 64, True)
    rerotated.operands.query[1, 0, 0] = float("nan")
    rerotated_attention(rerotated.operands, rerotated.queries)
    assert rerotated.out[1, 0].isnan().all() and not rerotated.out[0].isnan().any()
