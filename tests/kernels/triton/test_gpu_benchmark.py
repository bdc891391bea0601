"""The GPU benchmark without a GPU, and the work it counts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import gpu_kernels
from starling.attention_backends.kernels.reference import visible_mask


def test_without_a_gpu_it_exits_with_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_kernels"])
    with pytest.raises(SystemExit) as stopped:
        gpu_kernels.main()
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_work_is_that_of_the_mask():
    pairs = int(visible_mask(40, 100, causal=True, window=None).sum())
    assert gpu_kernels.attention_flops(40, 100) == 2 * 2 * pairs * gpu_kernels.HEADS * gpu_kernels.SIZE
    assert gpu_kernels.kv_bytes(1 << 20) == 4 << 30
