"""Runs a case through vLLM's metadata builders and attention impls, as its model runners call them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheTensor,
    KVQuantMode,
    SlidingWindowSpec,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup

from starling.attention_backends.star.backend import make_star_backend
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.head_step import HeadStep
from starling.attention_backends.star.rows import VirtualRows
from starling.attention_backends.star.step import StarStep, open_step, set_positions
from tests.gpu_contract.cases import HEAD_SIZE, ROTATION, SCALE, Case, Numbers
from tests.gpu_contract.cuda_platform import CUDA

NAN_BYTE = 0x7F  # NaN in float8_e4m3fn
UNSET_PAGE = 1 << 30  # in columns that no row uses
MAX_MODEL_LEN = 512


def make_config(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """The fields of vLLM's configuration that the builders read."""
    layout = KVCacheLayout[case.layout]
    model = SimpleNamespace(
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        rswa_window=None,
        is_mm_prefix_lm=False,
        hf_config=SimpleNamespace(model_type="llama"),
        get_num_attention_heads=lambda parallel: case.heads,
        get_num_kv_heads=lambda parallel: case.kv_heads,
        get_head_size=lambda: HEAD_SIZE,
    )
    rows = len(case.requests) + case.padding
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
            dcp_comm_backend="ag_rs",
        ),
        cache_config=SimpleNamespace(
            cache_dtype="fp8" if case.fp8 else "auto", get_resolved_kv_cache_layout=lambda: layout
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            max_cudagraph_capture_size=4,
            cudagraph_capture_sizes=[1, 2, 4],
            static_forward_context={},
        ),
        attention_config=SimpleNamespace(
            flash_attn_max_num_splits_for_cuda_graph=32,
            flash_attn_version=None,
            # vLLM quantizes only 16 bit queries to fp8.
            disable_flashinfer_q_quantization=True,
            use_trtllm_attention=None,
        ),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        # The smallest that fits, so that a buffer for fewer rows than a star step has is an error.
        scheduler_config=SimpleNamespace(max_num_seqs=rows, max_num_batched_tokens=case.num_tokens + case.padding),
        speculative_config=None,
        num_speculative_tokens=0,
        additional_config=None,
    )


class LayerGroup:
    """A KV cache group of one layer: its impl, pages and metadata builder."""

    def __init__(
        self, case: Case, base: type[AttentionBackend], config: Any, drawn: Numbers, index: int, by_parts: bool = False
    ) -> None:
        window = case.window if index else None
        self.case, self.name, self.window = case, f"layers.{index}.attn", window
        self.seed = case.seed + index
        shape = {
            "block_size": case.manager_page,
            "num_kv_heads": case.kv_heads,
            "head_size": HEAD_SIZE,
            "dtype": torch.uint8 if case.fp8 else torch.float32,
            "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR if case.fp8 else KVQuantMode.NONE,
        }
        spec = SlidingWindowSpec(**shape, sliding_window=window) if window else FullAttentionSpec(**shape)
        backend = make_star_backend(base, by_parts)
        self.impl = backend.get_impl_cls()(
            num_heads=case.heads,
            head_size=HEAD_SIZE,
            scale=SCALE,
            num_kv_heads=case.kv_heads,
            alibi_slopes=None,
            sliding_window=window,
            kv_cache_dtype="fp8" if case.fp8 else "auto",
            sinks=drawn.sinks,
        )
        if by_parts and window is None:
            self.impl.rotation = ROTATION
        q_scale, k_scale, v_scale = drawn.scales
        self.layer = Attention.__new__(Attention)
        torch.nn.Module.__init__(self.layer)
        self.layer.impl, self.layer.num_heads, self.layer.layer_name = self.impl, case.heads, self.name
        for name, scale in (("q", q_scale), ("k", k_scale), ("v", v_scale)):
            setattr(self.layer, f"_{name}_scale", torch.tensor(scale, dtype=torch.float32))
            setattr(self.layer, f"_{name}_scale_float", scale)
        config.compilation_config.static_forward_context[self.name] = self.layer
        self.group = AttentionGroup(backend, [self.name], spec, index)
        self.page_ids = self._allot()
        self.cache = self._allocate(spec)
        self._fill(drawn)

    def create_builder(self, config: Any) -> None:
        """Make the metadata builder; all layers of the model must be in ``config`` before."""
        self.group.create_metadata_builders(config, CUDA, self.case.kernel_page)

    def _allot(self) -> list[torch.Tensor]:
        """Scattered manager pages of each request, for its tokens so far. Page 0 is vLLM's null page."""
        counts = [-(-request.end // self.case.manager_page) for request in self.case.requests]
        self.num_pages = sum(counts) + 3
        generator = torch.Generator().manual_seed(self.seed)
        return list((1 + torch.randperm(self.num_pages - 1, generator=generator))[: sum(counts)].int().split(counts))

    def _allocate(self, spec: AttentionSpec) -> torch.Tensor:
        """The second of two layers' caches, (kernel pages, KV heads, kernel page size, 2 D), all NaN."""
        layout, page_bytes = KVCacheLayout[self.case.layout], spec.page_size_bytes
        strides = (page_bytes * self.num_pages, page_bytes) if layout.is_layer_compact else (page_bytes, 2 * page_bytes)
        size = 2 * page_bytes * self.num_pages
        raw = torch.full((size,), NAN_BYTE, dtype=torch.int8)
        tensor = KVCacheTensor(size, ["other", self.name], *strides)
        if not self.case.fp8:
            raw.view(torch.float32).fill_(float("nan"))
        return create_kv_cache_views(raw, spec, self.num_pages, layout, tensor, self.case.kernel_page)[1]

    def slots(self, row: int, positions: torch.Tensor) -> torch.Tensor:
        page_size = self.case.manager_page
        return self.page_ids[row].long()[positions // page_size] * page_size + positions % page_size

    def _fill(self, drawn: Numbers) -> None:
        """Store K and V of all tokens so far, this step's included."""
        page_size = self.case.kernel_page
        for row, (key, value) in enumerate(zip(drawn.keys, drawn.values, strict=True)):
            slots = self.slots(row, torch.arange(len(key)))
            for index, new in enumerate((key, value)):
                part = self.cache[..., index * HEAD_SIZE : (index + 1) * HEAD_SIZE]
                part[slots // page_size, :, slots % page_size] = new.view(torch.uint8) if self.case.fp8 else new

    def block_table(self) -> torch.Tensor:
        """(rows, columns) manager pages, with the null page in padding rows."""
        columns = -(-MAX_MODEL_LEN // self.case.manager_page)
        table = torch.full((len(self.page_ids) + self.case.padding, columns), UNSET_PAGE // 64, dtype=torch.int32)
        for row, ids in enumerate(self.page_ids):
            table[row, : len(ids)] = ids
        table[len(self.page_ids) :] = 0
        return table

    def slot_mapping(self) -> torch.Tensor:
        mapped = [
            self.slots(row, torch.arange(request.start, request.end)) for row, request in enumerate(self.case.requests)
        ]
        return torch.cat([*mapped, torch.full((self.case.padding,), -1)])


def batch_fields(case: Case) -> dict[str, Any]:
    """What a model runner passes to ``build_attn_metadata``: V2 leaves ``is_prefilling`` and ``req_idx`` unpadded."""
    rows, padding = len(case.requests), [0] * case.padding
    starts = torch.tensor([0, *np.cumsum(case.query_lens + padding)], dtype=torch.int32)
    seq_lens = torch.tensor([request.end for request in case.requests] + padding, dtype=torch.int32)
    prefilling = torch.tensor([request.plan is not None for request in case.requests])
    if case.runner == "V1":
        prefilling = torch.cat([prefilling, torch.zeros(case.padding, dtype=torch.bool)])
    return {
        "num_reqs": rows + case.padding,
        "num_tokens": case.num_tokens + case.padding,
        "query_start_loc_gpu": starts.clone(),
        "query_start_loc_cpu": starts,
        "max_query_len": max(case.query_lens),
        "seq_lens": seq_lens.clone(),
        "max_seq_len": int(seq_lens.max()),
        "seq_lens_cpu_upper_bound": seq_lens,
        "is_prefilling": prefilling,
        "req_idx": np.arange(rows, dtype=np.intp) + 40 if case.runner == "V2" else None,
    }


def run_case(
    case: Case, base: type[AttentionBackend], drawn: Numbers, by_parts: bool = False
) -> tuple[list[tuple[torch.Tensor, int | None]], VirtualRows | None]:
    """Run one step over a full layer, and over a windowed one if the case has one.

    Args:
        by_parts: whether the engine is made for documents or dense heads.

    Returns:
        Each layer's output (tokens, H, D) with its window, and the step's virtual rows; None: no star rows.
    """
    config = make_config(case)
    groups = [LayerGroup(case, base, config, drawn, index, by_parts) for index in range(2 if case.window else 1)]
    for group in groups:
        group.create_builder(config)
    ids = [str(index) for index in range(len(case.requests))]
    counted: list[VirtualRows] = []
    plans = {name: request.plan for name, request in zip(ids, case.requests, strict=True) if request.plan is not None}
    scheduled = dict(zip(ids, case.query_lens, strict=True))
    ranks = {groups[0].name: np.array(case.ranks)} if case.ranks else {}
    documents, heads = DocumentStep(), HeadStep(plans.values(), ranks)
    has_documents = any(plan.documents for plan in plans.values())
    step = StarStep(
        plans,
        scheduled,
        lambda: ids,
        counted.append,
        documents if has_documents else None,
        heads if heads.counts else None,
    )
    outputs = []

    def build() -> dict[str, Any]:
        return build_attn_metadata(
            attn_groups=[[group.group] for group in groups],
            block_tables=[group.block_table() for group in groups],
            slot_mappings=torch.stack([group.slot_mapping() for group in groups]),
            kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
            **batch_fields(case),
        )

    if case.ranks:
        build()  # a dense step before this one: the builders have what they make once
    with open_step(step):
        metadata = build()
        set_positions(torch.zeros(case.num_tokens, dtype=torch.int64))
        for group in groups:
            out = torch.full((len(drawn.queries), case.heads, HEAD_SIZE), float("nan"))
            group.impl.forward(group.layer, drawn.queries, None, None, group.cache, metadata[group.name], out)
            assert out[case.num_tokens :].isnan().all(), "an output of padding was written"
            outputs.append((out[: case.num_tokens], group.window))
    return outputs, counted[0] if counted else None
