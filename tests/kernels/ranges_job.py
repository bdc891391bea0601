"""Run in a process with the shim of tests/v2_shim, which makes Triton usable without a GPU.

interpret   runs the kernels as Python, and compares them to attention over all keys in float64 (TRITON_INTERPRET=1)
wide        runs the kernels as Python on pages and tokens that lie far apart (TRITON_INTERPRET=1)
compile     compiles the kernels for NVIDIA GPUs to machine code (without TRITON_INTERPRET)
steps       counts the kernels that steps of any size compile, and their launches (without TRITON_INTERPRET)
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from starling.attention_backends.kernels.contract import Rotation
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table

POSITIONS, SCALE = 90, 0.3


@dataclass(frozen=True)
class Case:
    """Tokens over ranges.

    Args:
        lens: keys of each batch row.
        ranges: (batch row, first, stop) of each range, in any order.
        queries: the last tokens of each row, which attend; there are others of the step before them.
        tile_queries: how many of them a program has at once.
        unseen: keys at the end of each row that the device's lengths leave out, as with asynchronous scheduling.
    """

    lens: tuple[int, ...]
    ranges: tuple[tuple[int, int, int], ...]
    queries: tuple[int, ...] = ()
    tile_queries: int = 1
    kv_heads: int = 2
    group: int = 3
    size: int = 32
    value_size: int = 32
    rotary_dim: int = 32
    is_neox_style: bool = True
    page_size: int = 16
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    unseen: int = 0


class Step:
    """A case in random numbers: the query, the pages, and by how much the token of each range is rerotated."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        pages = [-(-length // case.page_size) for length in case.lens]
        ids = torch.randperm(sum(pages)) + 1
        self.table = torch.full((len(case.lens), max(pages) + 2), 2**30, dtype=torch.int32)
        for row, own in enumerate(ids.split(pages)):
            self.table[row, : len(own)] = own
        shape = sum(pages) + 1, case.page_size, case.kv_heads
        self.keys = torch.randn(*shape, case.size).to(case.dtype)
        self.values = torch.randn(*shape, case.value_size).to(case.dtype)
        queries = np.array(case.queries or [1] * len(case.lens))
        self.starts = torch.tensor([1, *1 + np.cumsum(queries + 2)], dtype=torch.int32)
        self.query = torch.randn(int(self.starts[-1]) + 1, case.kv_heads * case.group, case.size).to(case.dtype)
        self.seq_lens = torch.tensor(case.lens, dtype=torch.int32) - case.unseen
        self.angles = torch.outer(torch.arange(POSITIONS), 0.7 ** torch.arange(case.rotary_dim // 2).double())
        self.rotation = Rotation(self.angles.cos().float(), self.angles.sin().float(), case.is_neox_style)
        row, first, stop = np.array(sorted(case.ranges, key=lambda one: one[0])).T
        rows, number = np.unique(row, return_inverse=True)
        rotate_by = torch.randint(POSITIONS, (len(row),)).numpy()
        self.ranges = TokenRanges(rows, queries[rows], number, first, stop, rotate_by)

    def range_table(self) -> RangeTable:
        return make_range_table(self.ranges, self.case.tile_queries, self.table, self.starts, self.seq_lens)

    def rerotated(self, token: int, rotate_by: int) -> torch.Tensor:
        """(H, D) float64: a token of the query, rotated back by complex numbers."""
        query = self.query[token].double()
        part = query[:, : self.case.rotary_dim]
        part = part.unflatten(1, (2, -1)).mT if self.case.is_neox_style else part.unflatten(1, (-1, 2))
        back = torch.polar(torch.ones(self.case.rotary_dim // 2).double(), -self.angles[rotate_by])
        found = torch.view_as_real(torch.view_as_complex(part.contiguous()) * back)
        found = found.mT if self.case.is_neox_style else found
        return torch.cat([found.flatten(1), query[:, self.case.rotary_dim :]], 1)

    def expected(self) -> torch.Tensor:
        """(T, H, Dv) float64; NaN for the tokens that have no ranges."""
        out = torch.full((*self.query.shape[:2], self.case.value_size), float("nan")).double()
        ranges = self.ranges
        for number, (row, queries) in enumerate(zip(ranges.rows.tolist(), ranges.queries.tolist(), strict=True)):
            length = int(self.seq_lens[row])
            pages = self.table[row, : -(-length // self.case.page_size)].long()
            keys, values = (
                cache[pages].flatten(0, 1).double().repeat_interleave(self.case.group, 1).transpose(0, 1)
                for cache in (self.keys, self.values)
            )
            for behind in range(1, queries + 1):
                token, scores, seen = int(self.starts[row + 1]) - behind, [], []
                for one in np.flatnonzero(ranges.row == number):
                    span = slice(int(ranges.first[one]), min(int(ranges.stop[one]), length - behind + 1))
                    query = self.rerotated(token, int(ranges.rotate_by[one]))
                    scores.append(torch.einsum("hd,hkd->hk", query, keys[:, span]) * SCALE)
                    seen.append(values[:, span])
                score = torch.cat(scores, 1)
                score = self.case.softcap * torch.tanh(score / self.case.softcap) if self.case.softcap else score
                out[token] = torch.einsum("hk,hkd->hd", score.softmax(1), torch.cat(seen, 1))
        return out

    def run(self, programs: int, table: RangeTable | None = None) -> torch.Tensor:
        from starling.attention_backends.kernels.triton.ranges import attend_ranges

        out = torch.full((*self.query.shape[:2], self.case.value_size), float("nan"), dtype=self.case.dtype)
        options = {"scale": SCALE, "softcap": self.case.softcap, "programs": programs}
        caches = self.keys, self.values
        attend_ranges(self.query, caches, table or self.range_table(), self.rotation, out, **options)
        return out


SHORT = Case(
    (40, 90, 300, 17, 5),
    ((0, 0, 40), (1, 0, 30), (1, 32, 90), (2, 250, 300), (2, 0, 16), (2, 16, 17), (2, 32, 240), (4, 0, 5)),
)
DOCUMENTS = Case((400,), tuple((0, start, start + 9 + start % 7) for start in range(0, 390, 16)), kv_heads=1, group=1)
LONG = Case((12, 700, 30), ((0, 0, 12), (1, 0, 700), (2, 0, 16), (2, 16, 30)), kv_heads=1, group=8)
QUESTIONS = replace(SHORT, queries=(3, 40, 1, 17, 2), tile_queries=8)
CASES = {
    "short": SHORT,
    "pairs": replace(SHORT, is_neox_style=False),
    "half is re-rotated": replace(SHORT, rotary_dim=16),
    "a quarter is re-rotated in pairs": replace(SHORT, rotary_dim=8, is_neox_style=False),
    "head sizes 80 and 48": replace(SHORT, size=80, value_size=48, rotary_dim=40),
    "softcap": replace(SHORT, softcap=2.0),
    "asynchronous": replace(SHORT, unseen=4),
    "float16": replace(SHORT, dtype=torch.float16),
    "bfloat16": replace(SHORT, dtype=torch.bfloat16, size=64, value_size=64),
    "documents": DOCUMENTS,
    "long beside short": LONG,
    "pages of 128": replace(LONG, page_size=128),
    "questions": QUESTIONS,
    "questions, tiles of five": replace(QUESTIONS, tile_queries=5, is_neox_style=False),
    "questions, asynchronous": replace(QUESTIONS, tile_queries=10, unseen=4),
    "questions, bfloat16": replace(QUESTIONS, dtype=torch.bfloat16, tile_queries=21),
}


def interpret() -> None:
    """Divided among one program, some, and more than there are tiles."""
    for name, case in CASES.items():
        step = Step(case)
        want = step.expected()
        limit = 3e-6 if case.dtype is torch.float32 else 6 * torch.finfo(case.dtype).eps
        for programs in (1, 40) if case is DOCUMENTS else (3,):
            got = step.run(programs).double()
            scale = want.nan_to_num().abs().max().item()
            torch.testing.assert_close(got, want, rtol=0, atol=limit * scale, equal_nan=True, msg=name)
    for case in (SHORT, LONG, QUESTIONS):
        step = Step(case)
        torch.testing.assert_close(step.run(3, room_for_more(step)), step.run(3), rtol=0, atol=0, equal_nan=True)
    step = Step(SHORT)
    right = step.run(2)
    step.ranges.rotate_by[:] = 0
    difference = (step.run(2) - right).nan_to_num().abs().max()
    assert difference > 0.1, "without a rotation the result is another one"
    time_tiles()


def time_tiles() -> None:
    """`starling selftest` compares the results of all tiles, and names the fastest."""
    from starling.lab.selftest.kernels import Call, Shape
    from starling.lab.selftest.kernels import time_tiles as compare

    shape = Shape(rows=1, documents=2, document_tokens=80, kv_heads=1, group=2, size=16)
    for queries in (1, 9):
        call = Call(shape, queries, "cpu", torch.float32)
        default, *others = call.choices()
        times = [2.0, *[3.0] * (len(others) - 1), 1.0]
        found = compare(call, functools.partial(take_first, times))
        assert (found.measured, found.bound, times) == (2, None, []), found
        assert found.detail == f"{default}: 2000.0 us; best: {others[-1]}: 1000.0 us", found


def take_first(times: list[float], run: Any) -> float:
    """What a call took, as the test has it."""
    run()
    return times.pop(0)


def room_for_more(step: Step) -> RangeTable:
    """The table as a CUDA graph has it: with room for more places and ranges."""
    table = step.range_table()
    max_places = table.max_places + 3
    numbers = torch.full((2000,), 2**30, dtype=torch.int32)
    packed = torch.from_numpy(step.ranges.packed(step.case.tile_queries, max_places))
    numbers[: len(packed)] = packed
    return replace(table, numbers=numbers, max_places=max_places)


def interpret_wide() -> None:
    """Pages, rows of the block table's batch and tokens at offsets above 2^31 elements."""
    from starling.attention_backends.kernels.triton.ranges import attend_ranges
    from tests.kernels.sparse import keep_arguments_in_place, spread

    keep_arguments_in_place()
    sizes = {"kv_heads": 1, "group": 2, "size": 16, "value_size": 16, "rotary_dim": 16}
    step = Step(Case((16, 10, 3), ((0, 0, 16), (1, 0, 10), (2, 0, 3)), **sizes))
    step.keys, step.values = step.keys[:3], step.values[:3]
    step.table[:, 0] = torch.tensor([2, 1, 2])
    step.query, step.starts = step.query[:3], torch.arange(4, dtype=torch.int32)
    want = step.run(2)
    out = spread(torch.zeros_like(want))
    caches = spread(step.keys), spread(step.values)
    table = replace(step.range_table(), block_table=spread(step.table))
    attend_ranges(spread(step.query), caches, table, step.rotation, out, scale=SCALE, programs=2)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


PROGRAMS = {
    "3.7": {1: {80: 3, 86: 2, 90: 4, 100: 3, 120: 2}, 16: {80: 1, 86: 1, 90: 2, 100: 1, 120: 1}},
    "3.8": {1: {80: 3, 86: 2, 90: 4, 100: 4, 120: 2}, 16: {80: 1, 86: 1, 90: 2, 100: 1, 120: 1}},
}
"""Programs of a multiprocessor for Llama 3.1, by version of Triton, queries of a tile and compute capability."""


def compile_kernels() -> None:
    """Those of Llama 3.1 on all GPUs; on two of them, the largest head size and one that is no power of two.

    Keys are loaded while products of the keys before are computed, and a multiprocessor has as many programs as it did.
    """
    import triton

    from starling.attention_backends.kernels.contract import Sizes
    from starling.attention_backends.kernels.triton import ranges
    from starling.attention_backends.kernels.triton.launch import head_block
    from tests.kernels.machine_code import CAPABILITIES, check_resources, loads_beside_products

    programs = PROGRAMS[triton.__version__.rpartition(".")[0]]
    llama, others = ("bf16", 128, 4, True), (("fp16", 80, 1, False), ("fp32", 256, 8, True), ("bf16", 256, 8, True))
    for capability in CAPABILITIES:
        for dtype, size, group, is_neox in (llama, *(others if capability in (80, 120) else ())):
            element_bytes = 4 if dtype == "fp32" else 2
            sizes = Sizes(1, 1, group, 1, size, size, 16)
            for queries in (1, ranges.prefill_tile_queries(sizes, element_bytes)):
                tile = ranges.range_tile(sizes, element_bytes, queries, divmod(capability, 10))
                block = head_block(size)
                shape = {
                    **{"GROUP": group, "QUERIES": queries, "HEAD_SIZE_V": size, "BLOCK_M": tile.lanes},
                    "BLOCK_DV": block,
                }
                constants = {
                    **{"PAGE_SIZE": 16, "HEAD_SIZE": size, "PAIRS": size // 2, "IS_NEOX": is_neox},
                    **{"BLOCK_N": tile.keys, "BLOCK_D": block, "CAPPED": False, "UPCAST": False},
                } | dict.fromkeys(("query_stride", "key_stride", "value_stride"), 1)
                types = {
                    **dict.fromkeys(("query", "key_cache", "value_cache", "out"), f"*{dtype}"),
                    **dict.fromkeys(("parts", "part_lses", "cos", "sin"), "*fp32"),
                    **dict.fromkeys(("numbers", "block_table", "query_start_loc", "seq_lens"), "*i32"),
                    **dict.fromkeys(("scale", "softcap"), "fp32"),
                }
                options = {"num_warps": tile.warps, "num_stages": tile.stages}
                attend = ranges.attend_ranges_kernel
                made = check_resources(attend, types, shape | constants, capability, True, **options)
                assert min(loads_beside_products(made.kernel)) > 0, (capability, dtype, size, queries)
                if (dtype, size) == ("bf16", 128):
                    assert made.programs == programs[queries][capability], (capability, queries, made.programs)
                check_resources(ranges.merge_ranges_kernel, types, shape, capability, True, num_warps=tile.warps)


class Allocations(TorchDispatchMode):
    """While this holds, torch may allocate tensors, whose bytes it counts. Anything else would be a launch of torch."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket in (torch.ops.aten.new_empty, torch.ops.aten.empty), function
        made = function(*args, **(kwargs or {}))
        self.num_bytes += made.nbytes
        return made


def count_kernels_of_steps() -> None:
    """One kernel of each kind takes all steps, and a layer launches each once, and nothing else."""
    from starling.attention_backends.kernels.triton.paged import DECODE_LANES
    from starling.attention_backends.kernels.triton.ranges import attend_ranges, partial_bytes
    from tests.kernels.compiles import count_compiles, count_launches

    compiled = count_compiles()
    for count in (1, 2, 16, 17, 100):
        lens = (30,) * count
        step = Step(Case(lens, tuple((row, first, first + 9) for row in range(count) for first in (0, 16))))
        operands = step.query, (step.keys, step.values), step.range_table(), step.rotation, torch.empty_like(step.query)
        programs = 5 if count % 2 else 16
        with count_launches() as launched, Allocations() as allocated:
            attend_ranges(*operands, scale=SCALE, programs=programs)
        assert allocated.num_bytes == partial_bytes(programs, step.case.kv_heads, DECODE_LANES, step.case.value_size)
        assert launched == {"attend_ranges_kernel": 1, "merge_ranges_kernel": 1}, launched
    assert compiled == launched, compiled


def main() -> None:
    jobs = {"interpret": interpret, "wide": interpret_wide, "compile": compile_kernels, "steps": count_kernels_of_steps}
    jobs[sys.argv[1]]()
