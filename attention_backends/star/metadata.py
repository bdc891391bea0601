"""Rewrites vLLM's per-batch attention metadata from batch rows to virtual rows."""

from __future__ import annotations

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.star.rows import VirtualRows

# Fields with one entry a batch row, or keyed by batch row, for which no row split is defined. The features that set
# them are refused at startup (refusals.py); a field that is set all the same must not be ignored.
ROW_FIELDS_WITHOUT_A_SPLIT = (
    "logits_indices_padded",
    "encoder_seq_lens",
    "encoder_seq_lens_cpu",
    "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound",
    "mm_req_doc_ranges",
    "rswa_prefix_lens",
    "replayssm_decode_base_cpu",  # before vLLM 0.34
)


def virtual_block_table(table: torch.Tensor, rows: VirtualRows, source: torch.Tensor | None = None) -> torch.Tensor:
    """(batch rows, columns) pages -> (virtual rows, columns) pages; columns past a row's end are unspecified.

    Args:
        source: ``rows.source`` on the device of the table, where the caller has it; else it is copied.
    """
    if source is None:
        source = async_tensor_h2d(rows.source, table.device)
    virtual = table[source]
    if len(rows.gathered):
        gathered = async_tensor_h2d(rows.gathered, table.device)
        columns = async_tensor_h2d(rows.page_columns, table.device)
        virtual[gathered, : columns.shape[1]] = table[source[gathered]].gather(1, columns)
    return virtual


def _split_field(values: np.ndarray, source: np.ndarray, padding: int) -> np.ndarray:
    """(batch rows,) values -> (virtual rows,) values. Batch rows past the end of ``values`` get ``padding``.

    Model runner V2 pads the other fields to the size of a CUDA graph, but not the ones that are split here
    (vllm/v1/worker/gpu/model_states/default.py).
    """
    split = np.full(len(source), padding, dtype=values.dtype)
    live = source < len(values)
    split[live] = values[source[live]]
    return split


def virtual_metadata(common: CommonAttentionMetadata, rows: VirtualRows) -> CommonAttentionMetadata:
    """Return the metadata of the same tokens in virtual rows. Slot mapping and positions are per token: unchanged.

    Raises:
        RuntimeError: the batch carries a per-row field that can't be split.
    """
    for name in ROW_FIELDS_WITHOUT_A_SPLIT:
        if getattr(common, name, None) is not None:
            raise RuntimeError(f"star rows in a batch with {name}, which has no split into virtual rows")
    if not isinstance(common.causal, bool):
        raise RuntimeError("star rows in a batch with a per-row causal tensor, which has no split")
    device = common.seq_lens.device
    device_source = async_tensor_h2d(rows.source, device)
    starts = np.concatenate(([0], np.cumsum(rows.query_lens))).astype(np.int32)
    query_start_loc_cpu = torch.from_numpy(starts)
    # The host's length of a decode row may be an upper bound (async scheduling): keep the device's.
    seq_lens = common.seq_lens[device_source]
    changed = np.flatnonzero(rows.shortened)  # as a mask on the device they would be counted on the host
    seq_lens[async_tensor_h2d(changed, device)] = async_tensor_h2d(rows.seq_lens[changed], device, seq_lens.dtype)
    upper_bound = torch.from_numpy(rows.seq_lens).to(seq_lens.dtype)
    is_prefilling, req_idx = common.is_prefilling, common.req_idx
    if is_prefilling is not None:
        is_prefilling = torch.from_numpy(_split_field(is_prefilling.numpy(), rows.source, padding=False))
    if req_idx is not None:
        req_idx = _split_field(req_idx, rows.source, padding=-1)
    return common.replace(
        query_start_loc=async_tensor_h2d(query_start_loc_cpu, device),
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=upper_bound,
        num_reqs=len(rows.source),
        max_query_len=int(rows.query_lens.max()),
        max_seq_len=int(rows.seq_lens.max()),
        block_table_tensor=virtual_block_table(common.block_table_tensor, rows, device_source),
        is_prefilling=is_prefilling,
        req_idx=req_idx,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
