"""FlashInfer by its documented contracts: the wrappers' ``plan`` and ``run``, and the XQA and TRT-LLM functions.

Sources: flashinfer/decode.py and flashinfer/prefill.py (docs.flashinfer.ai). Page tables are three int32 arrays: page
counts summed up (``indptr``), page ids (``indices``) and the tokens of each row's last page (``last_page_len``).
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from tests.gpu_contract.kernels import check_batch, check_pages, paged_attention, require


def get_seq_lens(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """(rows,) keys of each row."""
    return (indptr.diff() - 1).clamp(min=0) * page_size + last_page_len


def _paged(caches: tuple[torch.Tensor, torch.Tensor], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value caches as (pages, page size, KV heads, D)."""
    require(caches[0].stride() == caches[1].stride() and caches[0].stride(-1) == 1, "strides of keys and values")
    key_cache, value_cache = caches
    return (key_cache, value_cache) if layout == "NHD" else (key_cache.transpose(1, 2), value_cache.transpose(1, 2))


class _Wrapper:
    """What the two wrappers share: a plan of rows, and its run."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str = "NHD", **buffers: Any) -> None:
        require(workspace.dtype == torch.uint8, "the workspace is not uint8")
        require(kv_layout in ("NHD", "HND"), f"no layout {kv_layout}")
        self._layout = kv_layout
        self.is_cuda_graph_enabled = buffers.get("use_cuda_graph", False)
        self._buffers = [buffers.get(f"paged_kv_{name}_buffer") for name in ("indptr", "indices", "last_page_len")]

    def _plan(
        self,
        starts: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        seq_lens: torch.Tensor,
        page_size: int,
        heads: tuple[int, int, int],
        **named: Any,
    ) -> None:
        rows = len(starts) - 1
        for name, tensor in (("qo_indptr", starts), ("indptr", indptr), ("indices", indices)):
            require(tensor.dtype == torch.int32 and tensor.is_contiguous(), f"{name} is not contiguous int32")
        require(last_page_len.dtype == torch.int32, f"last_page_len is {last_page_len.dtype}")
        require(len(indptr) == rows + 1 and len(last_page_len) == rows, f"{len(indptr)} page starts of {rows} rows")
        require((indptr.diff() >= 0).all(), f"page starts {indptr.tolist()} are not monotone")
        require(indptr[-1] <= len(indices), f"{int(indptr[-1])} pages of {len(indices)} listed")
        held = (indptr.diff() == 0) == (last_page_len == 0)
        require((held & (last_page_len <= page_size)).all(), f"last pages of {last_page_len.tolist()} tokens")
        require(torch.equal(seq_lens, get_seq_lens(indptr, last_page_len, page_size)), "seq_lens differ from the pages")
        self._starts, self._lengths, self._page_size, self._heads = starts.clone(), seq_lens.int(), page_size, heads
        # A kernel reads the page ids at run time, from the caller's tensor.
        self._indptr, self._indices = indptr.clone(), indices
        self._sm_scale, self._window_left = named["sm_scale"], named["window_left"]
        self._logits_soft_cap = named["logits_soft_cap"] or 0.0
        self._dtypes = (named["q_data_type"], named["kv_data_type"], named["o_data_type"])

    def _run(
        self, query: torch.Tensor, caches: Any, out: torch.Tensor, sinks: Any, scales: tuple[float, float, float]
    ) -> torch.Tensor:
        key_cache, value_cache = _paged(caches, self._layout)
        require((query.dtype, key_cache.dtype, out.dtype) == self._dtypes, f"dtypes were planned as {self._dtypes}")
        require(query.shape == out.shape, f"query {tuple(query.shape)} and out {tuple(out.shape)} differ")
        require(out.is_contiguous(), "the kernels write tokens whose heads are next to one another")
        require(key_cache.shape[1] == self._page_size, f"pages of {key_cache.shape[1]}, planned {self._page_size}")
        require((query.shape[1], key_cache.shape[2], query.shape[2]) == self._heads, "heads differ from the plan's")
        require(self._starts[-1] <= len(query), f"{int(self._starts[-1])} queries planned, {len(query)} given")
        require(self._starts[0] == 0 and (self._starts.diff() >= 0).all(), "query starts do not rise from 0")
        rows = [self._indices[first:last] for first, last in zip(self._indptr, self._indptr[1:], strict=False)]
        for ids in rows:
            require(((ids >= 0) & (ids < len(key_cache))).all(), f"page ids {ids.tolist()} of {len(key_cache)}")
        paged_attention(
            *(query, key_cache, value_cache, out, self._starts, self._lengths, rows),
            scales=scales,
            scale=self._sm_scale,
            window=(self._window_left, 0),
            softcap=self._logits_soft_cap,
            sinks=sinks,
        )
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        seq_lens: torch.Tensor,
        fixed_split_size: int,
        disable_split_kv: bool,
        **named: Any,
    ) -> None:
        require(causal, "the plan is not causal")
        self._causal = causal
        pages = (paged_kv_indptr - paged_kv_indptr[0], paged_kv_indices[int(paged_kv_indptr[0]) :])
        self._plan(
            *(qo_indptr, *pages, paged_kv_last_page_len, seq_lens, page_size),
            (num_qo_heads, num_kv_heads, head_dim_qk),
            **named,
        )
        queries = qo_indptr.diff()
        require((self._lengths >= queries).all(), f"{queries.tolist()} queries, {self._lengths.tolist()} keys")

    def run(
        self,
        query: torch.Tensor,
        caches: Any,
        *,
        q_scale: float = 1.0,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        out: torch.Tensor,
        kv_cache_sf: None = None,
    ) -> torch.Tensor:
        return self._run(query, caches, out, None, (q_scale, k_scale, v_scale))


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    def run(  # type: ignore[override]
        self, query: torch.Tensor, caches: Any, sinks: torch.Tensor, scale: float, *, v_scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        return self._run(query, caches, out, sinks, (scale / self._sm_scale, 1.0, v_scale))


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        seq_lens: torch.Tensor | None = None,
        **named: Any,
    ) -> None:
        rows = len(last_page_len)
        if seq_lens is None:
            seq_lens = get_seq_lens(indptr, last_page_len, page_size)
        if self.is_cuda_graph_enabled:
            indptr_buffer, indices_buffer, last_buffer = self._buffers
            require(rows == len(last_buffer) == len(indptr_buffer) - 1, f"{rows} rows in a graph of {len(last_buffer)}")
            require(len(indices) <= len(indices_buffer), f"{len(indices)} pages in a buffer of {len(indices_buffer)}")
            require(indices.data_ptr() == indices_buffer.data_ptr(), "page ids are not in the graph's buffer")
        named.setdefault("o_data_type", named["q_data_type"])
        self._plan(
            *(torch.arange(rows + 1, dtype=torch.int32), indptr, indices, last_page_len, seq_lens, page_size),
            (num_qo_heads, num_kv_heads, head_dim),
            **named,
        )

    def run(
        self,
        query: torch.Tensor,
        caches: Any,
        *,
        q_scale: float,
        k_scale: float,
        v_scale: float,
        out: torch.Tensor,
        kv_cache_sf: None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        require(len(query) == len(self._lengths), f"{len(query)} queries of {len(self._lengths)} decode rows")
        return self._run(query, caches, out, sinks, (q_scale, k_scale, v_scale))


def fast_decode_plan(wrapper: BatchDecodeWithPagedKVCacheWrapper, **named: Any) -> None:
    """``plan`` of a CUDA graph's wrapper, once it has been planned in full."""
    wrapper.plan(**named)


def _table_attention(
    query: torch.Tensor,
    kv_cache: Any,
    out: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_queries: int,
    max_keys: int,
    layout: str,
    named: dict[str, Any],
) -> torch.Tensor:
    key_cache, value_cache = _paged(kv_cache, layout)
    for name, tensor in (("query", query), ("out", out), ("block tables", block_tables), ("seq_lens", seq_lens)):
        require(tensor.is_contiguous(), f"{name} are not contiguous")
    live = seq_lens > 0
    live_starts = torch.cat([starts[:1], starts[1:][live]])
    check_batch(query, out, live_starts, seq_lens[live], max_queries, max_keys)
    check_pages(block_tables, seq_lens, key_cache)
    paged_attention(
        *(query, key_cache, value_cache, out, starts, seq_lens, block_tables),
        scales=(1.0, 1.0, named["bmm2_scale"]),
        scale=named["bmm1_scale"],
        window=(named["window_left"], 0),
        sinks=named["sinks"],
    )
    return out


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: Any,
    *,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    out: torch.Tensor,
    **named: Any,
) -> torch.Tensor:
    require(batch_size == len(seq_lens), f"batch size {batch_size} of {len(seq_lens)} rows")
    page_size = kv_cache[0].shape[2]
    pages = torch.tensor([cdiv(length, page_size) for length in seq_lens.tolist()])
    require(torch.equal(cum_seq_lens_kv.diff(), pages.int()), "cum_seq_lens_kv does not count the rows' pages")
    batch = (cum_seq_lens_q, seq_lens, block_tables, max_q_len, max_kv_len)
    return _table_attention(query, kv_cache, out, *batch, "HND", named)


def _decode(
    query: torch.Tensor,
    kv_cache: Any,
    *,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    out: torch.Tensor,
    kv_layout: str,
    q_len_per_req: int | None = None,
    **named: Any,
) -> torch.Tensor:
    require(q_len_per_req == 1, f"{q_len_per_req} queries in a decode row")
    require(len(query) == len(seq_lens), f"{len(query)} queries of {len(seq_lens)} rows")
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    return _table_attention(query, kv_cache, out, starts, seq_lens, block_tables, 1, max_seq_len, kv_layout, named)


def install_flashinfer() -> None:
    """Put the package where vLLM imports it from."""
    package = types.SimpleNamespace(
        BatchAttentionWithAttentionSinkWrapper=BatchAttentionWithAttentionSinkWrapper,
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper=object,
        get_seq_lens=get_seq_lens,
        nvfp4_quantize_append_paged_kv_cache_with_slot_mapping=None,
    )
    decode = types.SimpleNamespace(
        fast_decode_plan=fast_decode_plan,
        trtllm_batch_decode_with_kv_cache=_decode,
        xqa_batch_decode_with_kv_cache=_decode,
    )
    prefill = types.SimpleNamespace(trtllm_batch_context_with_kv_cache=trtllm_batch_context_with_kv_cache)
    utils = types.SimpleNamespace(
        FP4Tensor=object,
        _get_range_buf=lambda *arguments: None,
        get_device_sm_count=lambda device: 132,
        get_trtllm_gen_multi_ctas_kv_counter_bytes=lambda *arguments: 1,
    )
    parts = {"": package, ".decode": decode, ".prefill": prefill, ".utils": utils, "_cubin": types.SimpleNamespace()}
    for suffix, part in parts.items():
        name = f"flashinfer{suffix}"
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=not suffix)
        vars(module).update(vars(part))
        sys.modules[name] = module
    from vllm.utils import flashinfer

    # Imports before this one asked for the package.
    flashinfer.has_flashinfer.cache_clear()
    flashinfer.has_flashinfer_cubin.cache_clear()
    # It reads the current configuration, which these jobs do not set.
    flashinfer.force_use_trtllm_attention = lambda: None
    flashinfer.pin_host_range_buf = lambda length: None
    from vllm.v1.attention.backends import flashinfer as backend

    backend.trtllm_workspace_buffer = torch.zeros(1, dtype=torch.uint8)
    if hasattr(backend, "_get_multi_ctas_kv_counter_buffer"):  # since vLLM 0.33, and on the GPU
        backend._get_multi_ctas_kv_counter_buffer = lambda num_bytes, device: torch.zeros(num_bytes, dtype=torch.uint8)
