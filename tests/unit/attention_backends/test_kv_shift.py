"""The shift over pages against its definition, for any split of a sequence into chunks and any mix of requests."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.compilation import breakable_cudagraph
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from starling.attention_backends.kv_shift.shift import NO_ROW, NO_SLOT, ShiftMetadata, find_predecessors, shift
from starling.attention_backends.kv_shift.state import (
    OP,
    WINDOW,
    ShiftState,
    ShiftStateBackend,
    ShiftStateBuilder,
    refuse_unsupported,
    state_spec,
)
from starling.vllm_compat.models import break_point
from tests.piecewise import graphs, in_pieces
from tests.references.kv_shift import shift_reference

HEADS, SIZE, PAGE_SIZE, NUM_PAGES = 2, 4, 4, 40


class Batch:
    """A state in pages, and sequences that run through it chunk by chunk, as in vLLM's model runner."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.weights = torch.rand(2, HEADS, 2) * 2 - 0.5
        self.raw = [torch.randn(2, length, HEADS * SIZE).to(dtype) for length in lengths]
        # Head-major strides. NaN stands for the garbage of freed pages: a read before a write fails the test.
        self.state = torch.full((NUM_PAGES, PAGE_SIZE, HEADS, 2 * SIZE), torch.nan, dtype=dtype).transpose(1, 2)
        page_ids = iter(random.Random(0).sample(range(1, NUM_PAGES), NUM_PAGES - 1))
        self.tables = [[next(page_ids) for _ in range(-(-length // PAGE_SIZE))] for length in lengths]
        self.done = [0] * len(lengths)

    def inputs(self, chunks: dict[int, int], padding: int = 0) -> SimpleNamespace:
        """Rows of K and V, and what a metadata builder reads, for the next tokens of some sequences.

        Args:
            chunks: number of tokens by sequence.
            padding: number of requests without tokens, and of rows without a slot, at the end of the batch.
        """
        rows = [self.raw[request][:, self.done[request] : self.done[request] + n] for request, n in chunks.items()]
        key, value = torch.cat([*rows, torch.zeros(2, padding, HEADS * SIZE, dtype=rows[0].dtype)], 1)
        starts = torch.tensor([0, *chunks.values()] + [0] * padding).cumsum(0).int()
        lens = torch.tensor([self.done[request] + n for request, n in chunks.items()] + [0] * padding).int()
        table = torch.zeros(len(chunks) + padding, max(map(len, self.tables)), dtype=torch.int32)
        slots = []
        for row, (request, n) in enumerate(chunks.items()):
            page_ids = self.tables[request]
            table[row, : len(page_ids)] = torch.tensor(page_ids)
            positions = range(self.done[request], self.done[request] + n)
            slots += [page_ids[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for position in positions]
            self.done[request] += n
        return SimpleNamespace(
            key=key,
            value=value,
            query_start_loc=starts,
            seq_lens=lens,
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots + [-1] * padding),
        )

    def step(self, chunks: dict[int, int], padding: int = 0) -> list[torch.Tensor]:
        """Run ``inputs``; returns (2, tokens, heads * size) shifted K and V of each sequence."""
        step = self.inputs(chunks, padding)
        predecessors = find_predecessors(step.query_start_loc, step.seq_lens, step.block_table_tensor, PAGE_SIZE)
        metadata = ShiftMetadata(*predecessors, step.slot_mapping)
        shifted = torch.stack(shift(step.key, step.value, *self.weights, self.state, metadata))
        return self.split(shifted, chunks)

    def split(self, shifted: torch.Tensor, chunks: dict[int, int]) -> list[torch.Tensor]:
        return list(shifted[:, : sum(chunks.values())].split(list(chunks.values()), 1))

    def expected(self, request: int) -> torch.Tensor:
        both = zip(self.raw[request].float(), self.weights, strict=True)
        return torch.stack([shift_reference(x.unflatten(-1, (HEADS, SIZE)), w).flatten(1) for x, w in both])


@pytest.mark.parametrize("cuts", [[19], [1] * 19, [4, 4, 4, 4, 3], [3, 1, 8, 5, 2]], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_any_cut_of_a_sequence_gives_the_same(cuts, padding):
    batch = Batch([19])
    got = torch.cat([batch.step({0: cut}, padding)[0] for cut in cuts], 1)
    torch.testing.assert_close(got, batch.expected(0), rtol=0, atol=1e-6)


def test_requests_in_one_step_do_not_see_one_another():
    batch = Batch([9, 5, 12, 1])
    steps = [{0: 4, 1: 1}, {0: 1, 2: 7}, {3: 1, 2: 5, 1: 4, 0: 4}]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: [], 3: []}
    for chunks in steps:
        for request, shifted in zip(chunks, batch.step(chunks), strict=True):
            got[request].append(shifted)
    for request, shifted in got.items():
        torch.testing.assert_close(torch.cat(shifted, 1), batch.expected(request), rtol=0, atol=1e-6)


def test_a_page_that_another_request_fills_in_the_same_step_can_be_read():
    """vLLM's prefix cache also hits pages that are only scheduled to be written in the step."""
    batch = Batch([6, 6])
    batch.raw[1][:, :PAGE_SIZE] = batch.raw[0][:, :PAGE_SIZE]
    batch.tables[1][0] = batch.tables[0][0]
    batch.done[1] = PAGE_SIZE
    first, second = batch.step({0: 6, 1: 2})
    torch.testing.assert_close(first, batch.expected(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(second, batch.expected(1)[:, PAGE_SIZE:], rtol=0, atol=1e-6)


def test_the_mix_is_rounded_once():
    batch = Batch([7], torch.bfloat16)
    got = torch.cat([batch.step({0: 3})[0], batch.step({0: 4})[0]], 1)
    assert torch.equal(got, batch.expected(0).bfloat16())


def test_a_lost_state_is_noticed():
    batch = Batch([8])
    batch.step({0: 4})
    batch.state.zero_()
    assert not torch.allclose(batch.step({0: 4})[0], batch.expected(0)[:, 4:], atol=1e-2)


def test_without_metadata_the_state_does_not_change():
    batch = Batch([5])
    key, value = shift(*batch.raw[0], *batch.weights, batch.state, None)
    torch.testing.assert_close(torch.stack((key, value)), batch.expected(0), rtol=0, atol=1e-6)
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


ROWS = 8
STEPS = [{0: 8}, {0: 1, 1: 5}, {1: 1, 0: 6}, {2: 3, 1: 4, 0: 1}, {0: 1, 1: 1, 2: 1}]


class GraphBuffers:
    """The persistent inputs of a CUDA graph of ROWS rows, and the builder of the state's metadata."""

    def __init__(self):
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=ROWS))
        spec = SimpleNamespace(block_size=PAGE_SIZE)
        self.builder = ShiftStateBuilder(spec, ["layer"], config, torch.device("cpu"))
        self.key, self.value = torch.zeros(2, ROWS, HEADS * SIZE)
        self.slots = torch.full((ROWS,), -1)

    def build(self, step: SimpleNamespace) -> ShiftMetadata:
        """Copy a step to the buffers, with slot -1 in the rows after its tokens, and build its metadata."""
        tokens = min(ROWS, len(step.slot_mapping))
        self.key[:tokens], self.value[:tokens] = step.key[:ROWS], step.value[:ROWS]
        self.slots[:tokens], self.slots[tokens:] = step.slot_mapping[:ROWS], -1
        return self.builder.build(0, SimpleNamespace(**vars(step) | {"slot_mapping": self.slots[:ROWS]}))

    def capture(self) -> ShiftMetadata:
        """The metadata of vLLM's dummy batch (InputBatch.make_dummy): ROWS requests of one token, without slots."""
        ones = torch.ones(ROWS, dtype=torch.int32)
        tables = {
            "block_table_tensor": torch.zeros(ROWS, 9, dtype=torch.int32),
            "slot_mapping": torch.full((ROWS,), -1),
        }
        starts = torch.arange(ROWS + 1, dtype=torch.int32)
        rows = {"key": self.key, "value": self.value}
        return self.build(SimpleNamespace(query_start_loc=starts, seq_lens=ones, **tables, **rows))


@pytest.mark.parametrize("padded", [False, True], ids=["piecewise", "full"])
def test_a_captured_graph_is_right_for_any_batch(padded):
    """A graph keeps the metadata of its capture: ROWS requests, whose tensors a later step may fill in part.

    vLLM pads the requests for FULL graphs only. A breakable graph captured with metadata has ROWS requests too.
    """
    batch, buffers = Batch([30, 30, 30]), GraphBuffers()
    captured = buffers.capture()
    done = [0, 0, 0]
    for chunks in STEPS:
        buffers.build(batch.inputs(chunks, ROWS - len(chunks) if padded else 0))
        shifted = torch.stack(shift(buffers.key, buffers.value, *batch.weights, batch.state, captured))
        for request, got in zip(chunks, batch.split(shifted, chunks), strict=True):
            expected = batch.expected(request)[:, done[request] : batch.done[request]]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
            done[request] = batch.done[request]


class CaptureOnCpu(breakable_cudagraph.BreakableCUDAGraphCapture):
    """vLLM's capture of a breakable graph without its CUDA graphs: ``replay`` runs the break points alone."""

    def _begin_segment(self) -> None:
        self._capturing = True

    def _end_segment(self) -> None:
        self._capturing = False


@pytest.fixture
def made_again():
    """vLLM is asked anew whether breakable graphs are on, in the test and after it."""
    break_point.cache_clear()
    yield
    break_point.cache_clear()


@pytest.mark.parametrize("metadata_at_capture", [False, True], ids=["V1", "V2"])
def test_the_op_breaks_a_breakable_graph(metadata_at_capture, monkeypatch, made_again):
    """V1 captures breakable graphs without metadata, so a captured shift would never read the state."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    monkeypatch.setattr(breakable_cudagraph, "_weak_ref_capture_arg", lambda argument: argument)  # a CUDA op
    batch, buffers = Batch([30, 30, 30]), GraphBuffers()

    def context(metadata: ShiftMetadata | None) -> SimpleNamespace:
        return SimpleNamespace(
            attn_metadata=None if metadata is None else {"layer": metadata},
            no_compile_layers={"layer": SimpleNamespace(kv_cache=batch.state)},
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
        )

    with override_forward_context(context(buffers.capture() if metadata_at_capture else None)), CaptureOnCpu() as graph:
        outputs = torch.zeros(2, ROWS, HEADS * SIZE)
        torch.ops.starling.kv_shift(buffers.key, buffers.value, *batch.weights, *outputs, "layer")
    done = [0, 0, 0]
    for chunks in STEPS:
        with override_forward_context(context(buffers.build(batch.inputs(chunks)))):
            graph.replay()
        for request, got in zip(chunks, batch.split(outputs, chunks), strict=True):
            expected = batch.expected(request)[:, done[request] : batch.done[request]]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
            done[request] = batch.done[request]


class Layer(torch.nn.Module):
    """The shift, with arithmetic before and after it, as projections and the rotary embedding of a model."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights, self.shift = weights, SimpleNamespace(prefix="layer")

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = ShiftState.forward(self.shift, key / 2, value / 2, *self.weights)
        return key * 2, value * 2


def test_the_piece_after_the_op_reads_its_outputs_in_every_replay(monkeypatch):
    """With outputs that the op made itself, the CUDA graph after it would go on with those of the capture."""
    batch, buffers = Batch([30, 30, 30]), GraphBuffers()
    layer = in_pieces(Layer(batch.weights), [OP], monkeypatch)
    layers = {"layer": SimpleNamespace(kv_cache=batch.state)}
    with graphs(ROWS, attn_metadata=None, no_compile_layers=layers):
        layer(buffers.key, buffers.value)
    done, kept = [0, 0, 0], []
    for chunks in STEPS:
        metadata = {"layer": buffers.build(batch.inputs(chunks))}
        kept.append(torch.ones(2, ROWS, HEADS * SIZE))  # what the op made would lie at another address
        with graphs(ROWS, attn_metadata=metadata, no_compile_layers=layers):
            outputs = torch.stack(layer(buffers.key, buffers.value))
        for request, got in zip(chunks, batch.split(outputs, chunks), strict=True):
            expected = batch.expected(request)[:, done[request] : batch.done[request]]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
            done[request] = batch.done[request]


def attention_spec(value_bytes: int, **more):
    page_bytes = 128 * 8 * 2 * 64 * value_bytes
    sizes = {"block_size": 128, "num_kv_heads": 8, "head_size": 64, "page_size_bytes": page_bytes}
    return SimpleNamespace(**sizes | more)


@pytest.mark.parametrize(("value_bytes", "dtype", "page_size"), [(2, torch.bfloat16, 128), (1, torch.bfloat16, 64)])
def test_state_pages_have_the_bytes_of_attention_pages(value_bytes, dtype, page_size):
    """With an fp8 KV cache the state keeps the model's dtype, so its pages hold half as many tokens."""
    attention = attention_spec(value_bytes)
    spec = state_spec(attention, dtype)
    assert (spec.block_size, spec.sliding_window, spec.dtype) == (page_size, WINDOW, dtype)
    assert spec.page_size_bytes == attention.page_size_bytes


def test_a_row_is_the_same_whatever_lies_beside_it():
    """To the bit, as the backend says to vLLM's batch-invariant mode."""
    assert ShiftStateBackend.supports_batch_invariance()
    together, alone = Batch([9, 5, 12], torch.bfloat16), Batch([9, 5, 12], torch.bfloat16)
    in_batch = together.step({0: 4, 1: 5, 2: 7}), together.step({2: 5, 0: 5})
    assert torch.equal(in_batch[0][0], alone.step({0: 4})[0])
    assert torch.equal(in_batch[0][2], alone.step({2: 7})[0])
    assert torch.equal(in_batch[1][1], alone.step({0: 5})[0])


def test_a_page_that_does_not_fit_is_refused_by_name():
    scaled = attention_spec(1, page_size_bytes=128 * 8 * (2 * 64 + 8))
    with pytest.raises(ValueError, match="--kv-cache-dtype auto or fp8"):
        state_spec(scaled, torch.bfloat16)


def config_with(**options):
    plain = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}
    options = plain | {"disable_hybrid_kv_cache_manager": False} | options
    both = SimpleNamespace(**options)
    return SimpleNamespace(parallel_config=both, scheduler_config=both)


@pytest.mark.parametrize(
    "option",
    [
        {"decode_context_parallel_size": 2},
        {"prefill_context_parallel_size": 2},
        {"use_ubatching": True},
        {"disable_hybrid_kv_cache_manager": True},
    ],
    ids=str,
)
def test_unsupported_features_are_refused_by_name(option):
    refuse_unsupported(config_with())
    name = next(iter(option))
    with pytest.raises(ValueError, match="enable_dbo or ubatch_size" if name == "use_ubatching" else name):
        refuse_unsupported(config_with(**option))
