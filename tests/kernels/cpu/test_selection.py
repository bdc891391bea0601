"""The selection of a CPU op, as a table of measured batches."""

from __future__ import annotations

import pytest
import torch

from starling.attention_backends.kernels.cpu.paged_op import Op, Processor, select_op

ZEN4 = Processor(avx512=True, bf16_dot=True)
SKYLAKE = Processor(avx512=True, bf16_dot=False)
OLDER = Processor(avx512=False, bf16_dot=False)
STARLING, VLLM = Op.STARLING, Op.VLLM


@pytest.mark.parametrize(
    ("processor", "dtype", "queries", "keys", "group", "op"),
    [
        (ZEN4, torch.bfloat16, 1, 32768, 1, STARLING),
        (ZEN4, torch.bfloat16, 256, 32768, 4, STARLING),
        (ZEN4, torch.bfloat16, 512, 512, 1, STARLING),
        (ZEN4, torch.float32, 1, 32768, 4, STARLING),
        (ZEN4, torch.float32, 1, 200, 1, STARLING),
        (ZEN4, torch.float32, 1, 200, 4, VLLM),
        (ZEN4, torch.float32, 64, 4096, 1, STARLING),
        (ZEN4, torch.float32, 256, 32768, 1, VLLM),
        (ZEN4, torch.float16, 512, 512, 1, VLLM),
        (SKYLAKE, torch.bfloat16, 1, 32768, 1, STARLING),
        (SKYLAKE, torch.bfloat16, 256, 32768, 1, VLLM),
        (OLDER, torch.bfloat16, 1, 32768, 1, VLLM),
    ],
)
def test_select_op(processor, dtype, queries, keys, group, op):
    assert select_op(processor, dtype, queries=queries, keys=keys, group=group) is op


def test_detected_processor():
    flags = Processor.detect()
    assert flags.avx512 == torch.cpu._is_avx512_supported()
    assert not (flags.bf16_dot and not flags.avx512)
