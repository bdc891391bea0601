"""Run in a process with the shim of tests/v2_shim, which makes Triton usable without a GPU.

interpret   runs decode steps as Python, and compares them to the torch path in float64 (TRITON_INTERPRET=1)
wide        runs a step as Python on pages and tokens that lie far apart (TRITON_INTERPRET=1)
compile     compiles the kernels for NVIDIA GPUs to machine code (without TRITON_INTERPRET)
steps       counts the kernels that steps of any size compile (without TRITON_INTERPRET)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch.nn.functional import rms_norm, silu

from starling.attention_backends.attamba import attend_step, decode, decode_kernels, mix
from starling.attention_backends.attamba.attamba_backend import AttambaMetadata
from starling.attention_backends.attamba.attend_step import Cache, Sizes
from starling.attention_backends.attamba.cache import KvPages
from starling.attention_backends.attamba.chunks import PAGE_ROWS, StepTokens, chunk_start, dense_tokens, plan_step
from starling.attention_backends.attamba.mixer import MixerSizes
from starling.attention_backends.kernels import reference
from starling.attention_backends.kernels.contract import Layout
from tests.kernels.attamba_scan_job import make_parameters, recurrence
from tests.kernels.cases import rms

EPS = 1e-5


@dataclass
class Step:
    """A step with one token for each request, whose caches have random values of earlier tokens.

    Attributes:
        lens: tokens of each request.
        padding: requests of length 0 behind them, as of a CUDA graph.
    """

    chunk_size: int
    offset: int
    window: int
    mixer: MixerSizes
    heads: int
    head_size: int
    lens: list[int]
    padding: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        count, dim = len(self.lens) + self.padding, self.heads * self.head_size

        self.page_tokens = 8
        columns = -(-max(self.lens) // self.page_tokens)
        pages = count * columns + 1
        # Page 0 is vLLM's null page, which the block tables of padding have.
        self.table = torch.zeros(count, columns, dtype=torch.int32)
        order = 1 + torch.randperm(len(self.lens) * columns).int()
        self.table[: len(self.lens)] = order.reshape(-1, columns)
        self.projected = torch.randn(count, self.mixer.count * (self.mixer.inner + self.mixer.width))
        self.rows = torch.randn(pages, self.page_tokens, self.mixer.row)
        self.states, self.recent = torch.randn(2, pages, PAGE_ROWS + 1, 2 * dim)
        self.query, self.own = torch.randn(2, count, dim)
        self.mixed = tuple(torch.randn(2, count, dim))
        angles = torch.randn(max(self.lens), self.head_size // 2)
        self.angles = angles.cos(), angles.sin()
        self.parameters = make_parameters(self.mixer)
        self.sizes = Sizes(self.chunk_size, self.window + 1, self.head_size**-0.5)
        # Padding has length 0; the last request of a dummy run has a length and a block table, but no slot.
        self.seq_lens = torch.tensor([*self.lens, *[0] * self.padding], dtype=torch.int32)
        self.slots = torch.tensor([*range(len(self.lens)), *[-1] * self.padding])
        if self.padding > 1:
            self.seq_lens[-1], self.table[-1] = 1, self.table[0]

    def cast(self, dtype: torch.dtype) -> Step:
        """The same step in another dtype; the parameters stay in float32."""
        other = object.__new__(Step)
        other.__dict__.update(self.__dict__)
        for name in ("projected", "rows", "states", "recent", "query", "own"):
            setattr(other, name, getattr(self, name).to(dtype))
        other.mixed = tuple(part.to(dtype) for part in self.mixed)
        return other

    def caches(self, tokens: object = None) -> tuple[Cache, Cache]:
        count = len(self.seq_lens) if tokens is None else len(self.lens)
        starts = torch.arange(count + 1, dtype=torch.int32).clamp(max=len(self.lens))  # as vLLM pads
        tables, slots = (self.table[:count],) * 2, self.slots[:count]
        step = AttambaMetadata(count, tokens, *tables, starts, self.seq_lens[:count], slots)
        return tuple(Cache(KvPages(pages, self.heads, Layout.PAGES), step) for pages in (self.states, self.recent))

    def by_kernels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the mixers give, and what attention gives for ``mixed``."""
        step, layer = self.caches()[0].step, (self.chunk_size, self.offset)
        y = decode.mix_decode(self.projected, self.rows, step, *layer, self.parameters, self.mixer, EPS)
        out = torch.full_like(self.query, torch.nan)
        given = self.query, self.mixed, self.own, self.angles, *self.caches(), self.offset, self.sizes
        decode.attend_decode(*given, out)
        return y, out

    def exact_mixers(self) -> torch.Tensor:
        """What the mixers give, in float64, by the recurrence."""
        out = []
        for request, length in enumerate(self.lens):
            start = int(chunk_start(np.array([length - 1]), self.chunk_size, self.offset)[0])
            place = [(self.table[request, n // self.page_tokens], n % self.page_tokens) for n in range(start, length)]
            rows = torch.stack([self.rows[page, slot] for page, slot in place]).double()
            projected = self.projected[request].double().unflatten(0, (self.mixer.count, -1))
            gates, own = projected.split([self.mixer.inner, self.mixer.width], 1)
            rows[-1] = own.flatten()
            for mixer, (gate, of_mixer) in enumerate(zip(gates, rows.chunk(self.mixer.count, 1), strict=True)):
                conv, a_log, skip, norm = (part[mixer].double() for part in self.parameters)
                y = recurrence(of_mixer, conv, a_log, skip, self.mixer)[-1] * silu(gate)
                out.append(rms_norm(y, y.shape, norm, EPS))
        return torch.stack(out).unflatten(0, (len(self.lens), -1)).transpose(0, 1)

    def exact_attention(self) -> torch.Tensor:
        """What attention gives for ``mixed``, in float64, from the list of each request's keys."""
        heads, out = (self.heads, self.head_size), []

        def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
            cos, sin = (table[position].double() for table in self.angles)
            pairs = torch.view_as_complex(x.unflatten(-1, heads).unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)

        for request, length in enumerate(self.lens):
            last, first_in_window = length - 1, max(0, length - 1 - self.window)
            count = max(0, last - self.window + self.offset) // self.chunk_size
            table, own = self.table[request], self.own[request].double()
            rows = [self.states[table[n // PAGE_ROWS], n % PAGE_ROWS] for n in range(count)]
            if last > self.window and self.offset != self.chunk_size - 1:
                rows.append(self.states[table[0], PAGE_ROWS])
            rows += [self.recent[table[n // PAGE_ROWS], n % PAGE_ROWS] for n in range(first_in_window, last)]
            kept = [row.double().unflatten(0, (2, *heads)) for row in rows]
            key, value = (own + part[request].double() for part in self.mixed)
            keys, values = torch.stack([*kept, torch.stack([rotate(key, last), value.unflatten(0, heads)])], 1)
            scores = (keys * rotate(self.query[request].double(), last)).sum(-1) * self.sizes.scale
            out.append((scores.softmax(0)[..., None] * values).sum(0).flatten())
        return torch.stack(out)

    def by_torch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the requests that are no padding."""
        projected, plan = self.projected[: len(self.lens)], plan_step(self.tokens, *self.layer)
        y = mix.mix_in_torch(projected, self.rows, self.table, plan, self.parameters, self.mixer, EPS)
        query, own, *mixed = (part[: len(self.lens)] for part in (self.query, self.own, *self.mixed))
        return y, attend_step.attend_in_torch(
            query, mixed, own, self.angles, *self.caches(self.tokens), plan, self.sizes
        )

    @property
    def tokens(self) -> StepTokens:
        return dense_tokens(np.ones(len(self.lens), dtype=np.int64), np.array(self.lens))

    @property
    def layer(self) -> tuple[int, int, int]:
        return self.chunk_size, self.offset, self.window


SMALL = MixerSizes(2, 32, 16, 4)


def with_hit_pages(step: Step) -> Step:
    """The first request of two hits the page that the second one fills in the step, or the other way round."""
    first = step.lens.index(min(step.lens))
    step.table[1 - first, 0] = step.table[first, 0]
    return step


STEPS = (
    # Token 0, the ends of chunks and the tokens before and after, and lengths at which the window or a page ends.
    Step(4, 0, 5, SMALL, 2, 16, [1, 2, 4, 5, 6, 8, 9, 20, 64, 65, 66, 129], padding=3),
    Step(4, 3, 5, SMALL, 2, 16, [1, 2, 4, 5, 6, 7, 40, 69]),  # token 0 is a chunk state
    Step(3, 1, 1, MixerSizes(3, 39, 7, 2), 3, 10, [1, 2, 3, 17, 49]),  # no powers of 2
    Step(64, 21, 16, MixerSizes(4, 96, 40, 4), 1, 32, [1, 43, 44, 107, 108, 600], padding=1),
    Step(128, 0, 130, SMALL, 2, 16, [127, 128, 129, 700]),
    with_hit_pages(Step(4, 2, 5, SMALL, 2, 16, [8, 9])),
    with_hit_pages(Step(4, 2, 5, SMALL, 2, 16, [9, 8])),
)


def clone(step: Step) -> Step:
    """With caches of its own."""
    other = step.cast(step.projected.dtype)
    for name in ("rows", "states", "recent"):
        setattr(other, name, getattr(step, name).clone())
    return other


def interpret() -> None:
    attend_step.paged_attention = reference.paged_attention  # takes any head size
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    for step in STEPS:
        for dtype in (torch.float32, torch.bfloat16):
            of_dtype = step.cast(dtype)
            kernels, plain = clone(of_dtype), clone(of_dtype)
            got, want = kernels.by_kernels(), plain.by_torch()
            exact = plain.exact_mixers(), plain.exact_attention()  # whose caches have the rows of the step
            count = len(step.lens)
            for name in ("rows", "states", "recent"):
                mine, its = getattr(kernels, name)[1:], getattr(plain, name)[1:]
                tolerance = 1e-6 if dtype == torch.float32 else 2**-6  # the interpreter truncates bfloat16
                torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)
                # Page 0 takes what is stored for pages that no request has: padding stores nothing.
                torch.testing.assert_close(getattr(kernels, name)[0], getattr(of_dtype, name)[0], rtol=0, atol=0)
            for mine, its, true in zip((got[0][:, :count], got[1][:count]), want, exact, strict=True):
                assert mine.shape == its.shape
                assert mine.dtype == dtype
                ulp = torch.finfo(dtype).eps * rms(true)
                errors = rms(mine - true), rms(its - true)
                assert errors[0] <= 1.5 * errors[1] + 2 * ulp, (step, dtype, errors, ulp)
            assert not got[1][count:].any(), "padding gets zeros"


def interpret_wide() -> None:
    """Tokens and pages at offsets above 2^31 elements."""
    from tests.kernels.sparse import keep_arguments_in_place, spread

    keep_arguments_in_place()
    step = Step(4, 1, 5, SMALL, 2, 16, [5, 8, 7])
    # Three pages a cache: one for each request.
    step.table = torch.tensor([[2], [0], [1]], dtype=torch.int32)
    for name in ("rows", "states", "recent"):
        setattr(step, name, getattr(step, name)[:3].contiguous())
    wide = clone(step)
    want = step.by_torch()
    for name in ("rows", "states", "recent", "projected", "query", "own"):
        setattr(wide, name, spread(getattr(wide, name)))
    wide.mixed = tuple(spread(part) for part in wide.mixed)
    for mine, its in zip(wide.by_kernels(), want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    for name in ("rows", "states", "recent"):
        torch.testing.assert_close(getattr(wide, name), getattr(step, name), rtol=1e-6, atol=1e-6)


def compile_kernels() -> None:
    """The paper's sizes, the largest chunks and heads, and the smallest: each on each card, in one of two dtypes."""
    from tests.kernels.machine_code import CAPABILITIES, check_resources

    names = ["projected", "pages", "out", "mixed_key", "mixed_value", "own", "query", "rotated", "states_out"]
    names += ["window_out", "state_keys", "state_values", "window_keys", "window_values"]
    numbers = ["conv", "a_log", "skip", "norm", "cos", "sin", "states_lse", "window_lse"]
    common = {
        **dict.fromkeys(numbers, "*fp32"),
        **dict.fromkeys(("table", "state_table", "window_table", "seq_lens", "num_states"), "*i32"),
        "slots": "*i64",
        **dict.fromkeys(("eps", "scale"), "fp32"),
    }
    of_dtype = [
        (common | dict.fromkeys(names, f"*{dtype}"), aligned) for dtype, aligned in (("bf16", True), ("fp32", False))
    ]
    sizes = ((MixerSizes(8, 256, 128, 4), 128, 80), (MixerSizes(16, 1024, 128, 4), 8, 256), (SMALL, 2, 16))
    for (card, capability), (size, (mixer, chunk_size, head_size)) in product(
        enumerate(CAPABILITIES), enumerate(sizes)
    ):
        types, aligned = of_dtype[(card + size) % 2]
        constants = {"HEADS": mixer.heads, "INNER": mixer.inner, "STATE": mixer.state, "TAPS": mixer.taps}
        constants |= {"PAGE_TOKENS": 16} | decode.mix_blocks(mixer, chunk_size)
        warps = decode.warps(mixer)
        check_resources(decode_kernels.mix_kernel, types, constants, capability, aligned, num_warps=warps)
        width = mixer.width
        constants = {"INNER": mixer.inner, "WIDTH": width, "PAGE_TOKENS": 16}
        constants |= {"BLOCK_W": 1 << (width - 1).bit_length()}
        check_resources(decode_kernels.rows_kernel, types, constants, capability, aligned)
        block = 1 << (head_size - 1).bit_length()
        for kernel, width in ((decode_kernels.store_kernel, block // 2), (decode_kernels.join_kernel, block)):
            constants = {"HEAD_SIZE": head_size, "BLOCK_D": width}
            check_resources(kernel, types, constants, capability, aligned)


def count_kernels_of_steps() -> None:
    """Steps of one request to 33, in layers whose chunks begin anywhere: one kernel of each kind takes them all."""
    from tests.kernels.compiles import count_compiles

    compiled = count_compiles()
    for requests, padding, offset in ((1, 0, 0), (2, 1, 1), (16, 0, 2), (17, 15, 3), (33, 0, 16)):
        lens = [1 + 61 * request % 700 for request in range(requests)]
        Step(32, offset, 5, SMALL, 2, 16, lens, padding).by_kernels()
    attended = compiled.pop("paged_attention_kernel")
    assert attended == 2, attended  # with the window, and without one
    assert compiled == dict.fromkeys(("rows_kernel", "mix_kernel", "store_kernel", "join_kernel"), 1), compiled


def main() -> None:
    jobs = {"interpret": interpret, "wide": interpret_wide, "compile": compile_kernels, "steps": count_kernels_of_steps}
    jobs[sys.argv[1]]()
