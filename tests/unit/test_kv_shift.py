"""The shift over pages against the definition: any cut of a sequence, any mix of requests in a step."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from attention_backends.kv_shift.reference import shift_reference
from attention_backends.kv_shift.shift import NO_ROW, NO_SLOT, ShiftMetadata, find_predecessors, shift
from attention_backends.kv_shift.state import WINDOW, refuse_unsupported, state_spec

HEADS, SIZE, PAGE, PAGES = 2, 4, 4, 40


class Batch:
    """A state in pages, and the sequences that are fed to it chunk by chunk, as vLLM's runner would."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.weights = torch.rand(2, HEADS, 2) * 2 - 0.5
        self.raw = [torch.randn(2, length, HEADS * SIZE).to(dtype) for length in lengths]
        # Head-major strides, and garbage, as freed pages hold: nothing may be read that was not written.
        self.state = torch.full((PAGES, PAGE, HEADS, 2 * SIZE), torch.nan, dtype=dtype).transpose(1, 2)
        pages = iter(random.Random(0).sample(range(1, PAGES), PAGES - 1))
        self.tables = [[next(pages) for _ in range(-(-length // PAGE))] for length in lengths]
        self.done = [0] * len(lengths)

    def step(self, chunks: dict[int, int], padding: int = 0) -> list[torch.Tensor]:
        """Feed so many tokens of each sequence; (2, tokens, heads * size) shifted K and V of each.

        ``padding``: as many requests without tokens and rows without a slot after the others.
        """
        rows = [self.raw[request][:, self.done[request] : self.done[request] + n] for request, n in chunks.items()]
        key, value = torch.cat([*rows, torch.zeros(2, padding, HEADS * SIZE, dtype=rows[0].dtype)], 1)
        starts = torch.tensor([0, *chunks.values()] + [0] * padding).cumsum(0).int()
        lens = torch.tensor([self.done[request] + n for request, n in chunks.items()] + [0] * padding).int()
        table = torch.zeros(len(chunks) + padding, max(map(len, self.tables)), dtype=torch.int32)
        slots = []
        for row, (request, n) in enumerate(chunks.items()):
            pages = self.tables[request]
            table[row, : len(pages)] = torch.tensor(pages)
            positions = range(self.done[request], self.done[request] + n)
            slots += [pages[position // PAGE] * PAGE + position % PAGE for position in positions]
            self.done[request] += n
        predecessors = find_predecessors(starts, lens, table, PAGE)
        metadata = ShiftMetadata(*predecessors, torch.tensor(slots + [-1] * padding))
        shifted = torch.stack(shift(key, value, *self.weights, self.state, metadata))
        return list(shifted[:, : len(slots)].split(list(chunks.values()), 1))

    def wanted(self, request: int) -> torch.Tensor:
        both = zip(self.raw[request].float(), self.weights, strict=True)
        return torch.stack([shift_reference(x.unflatten(-1, (HEADS, SIZE)), w).flatten(1) for x, w in both])


@pytest.mark.parametrize("cuts", [[19], [1] * 19, [4, 4, 4, 4, 3], [3, 1, 8, 5, 2]], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_any_cut_of_a_sequence_gives_the_same(cuts, padding):
    batch = Batch([19])
    got = torch.cat([batch.step({0: cut}, padding)[0] for cut in cuts], 1)
    torch.testing.assert_close(got, batch.wanted(0), rtol=0, atol=1e-6)


def test_requests_in_one_step_do_not_see_one_another():
    batch = Batch([9, 5, 12, 1])
    steps = [{0: 4, 1: 1}, {0: 1, 2: 7}, {3: 1, 2: 5, 1: 4, 0: 4}]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: [], 3: []}
    for chunks in steps:
        for request, shifted in zip(chunks, batch.step(chunks), strict=True):
            got[request].append(shifted)
    for request, shifted in got.items():
        torch.testing.assert_close(torch.cat(shifted, 1), batch.wanted(request), rtol=0, atol=1e-6)


def test_a_page_that_another_request_fills_in_this_step_can_be_built_on():
    """vLLM lets a request hit pages that are scheduled to be written, not only written ones."""
    batch = Batch([6, 6])
    batch.raw[1][:, :PAGE] = batch.raw[0][:, :PAGE]
    batch.tables[1][0] = batch.tables[0][0]
    batch.done[1] = PAGE
    first, second = batch.step({0: 6, 1: 2})
    torch.testing.assert_close(first, batch.wanted(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(second, batch.wanted(1)[:, PAGE:], rtol=0, atol=1e-6)


def test_the_mix_is_rounded_once():
    batch = Batch([7], torch.bfloat16)
    got = torch.cat([batch.step({0: 3})[0], batch.step({0: 4})[0]], 1)
    assert torch.equal(got, batch.wanted(0).bfloat16())


def test_a_lost_state_is_noticed():
    batch = Batch([8])
    batch.step({0: 4})
    batch.state.zero_()
    assert not torch.allclose(batch.step({0: 4})[0], batch.wanted(0)[:, 4:], atol=1e-2)


def test_without_metadata_the_state_is_left_alone():
    batch = Batch([5])
    key, value = shift(*batch.raw[0], *batch.weights, batch.state, None)
    torch.testing.assert_close(torch.stack((key, value)), batch.wanted(0), rtol=0, atol=1e-6)
    assert batch.state.isnan().all()


def test_predecessors():
    rows, slots = find_predecessors(
        torch.tensor([0, 3, 4, 4]).int(),
        torch.tensor([3, 9, 0]).int(),
        torch.tensor([[7, 0, 0], [5, 2, 6], [0] * 3]),
        4,
    )
    assert rows.tolist() == [0, 3, NO_ROW]
    assert slots.tolist() == [NO_SLOT, 2 * 4 + 3, NO_SLOT]


def attention_spec(bytes_a_value: int, **more):
    page = 128 * 8 * 2 * 64 * bytes_a_value
    return SimpleNamespace(**{"block_size": 128, "num_kv_heads": 8, "head_size": 64, "page_size_bytes": page} | more)


@pytest.mark.parametrize(("bytes_a_value", "dtype", "tokens"), [(2, torch.bfloat16, 128), (1, torch.bfloat16, 64)])
def test_state_pages_have_the_bytes_of_attention_pages(bytes_a_value, dtype, tokens):
    """Beside an fp8 cache the state stays in the model's dtype, with half the tokens a page."""
    attention = attention_spec(bytes_a_value)
    spec = state_spec(attention, dtype)
    assert (spec.block_size, spec.sliding_window, spec.dtype) == (tokens, WINDOW, dtype)
    assert spec.page_size_bytes == attention.page_size_bytes


def test_a_page_that_does_not_fit_is_refused_by_name():
    scaled = attention_spec(1, page_size_bytes=128 * 8 * (2 * 64 + 8))
    with pytest.raises(ValueError, match="--kv-cache-dtype auto or fp8"):
        state_spec(scaled, torch.bfloat16)


def config_with(**options):
    plain = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_dbo": False}
    options = plain | {"disable_hybrid_kv_cache_manager": False} | options
    both = SimpleNamespace(**options)
    return SimpleNamespace(parallel_config=both, scheduler_config=both)


@pytest.mark.parametrize(
    "option",
    [
        {"decode_context_parallel_size": 2},
        {"prefill_context_parallel_size": 2},
        {"enable_dbo": True},
        {"disable_hybrid_kv_cache_manager": True},
    ],
    ids=str,
)
def test_what_it_does_not_run_with_is_named(option):
    refuse_unsupported(config_with())
    with pytest.raises(ValueError, match=next(iter(option))):
        refuse_unsupported(config_with(**option))
