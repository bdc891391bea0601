"""The star backends in processes that believe they are on CUDA: vLLM's own selection, and FlashInfer's own builder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from starling.attention_backends.star.backend import virtual_bounds
from tests.unit.gpu.flashinfer_job import make_scheduler_config
from tests.unit.gpu.selection_job import BACKENDS, CAPABILITIES


def run_job(name: str, *arguments: str):
    command = [sys.executable, "-m", f"tests.unit.gpu.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def selected():
    found = run_job("selection_job")
    return {(tuple(entry["capability"]), entry["backend"]): entry for entry in found}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda value: f"sm{value[0]}{value[1]}")
def test_vllm_selects_the_star_form_of_a_backend_by_name_and_automatically(selected, capability, backend):
    entry = selected[capability, backend]
    assert "error" not in entry, entry["error"]
    automatic = "FLASHINFER" if capability == (10, 0) else "FLASH_ATTN"
    assert entry["name"] == (backend or automatic)
    assert entry["class"].startswith("Star") and entry["extends"] and entry["splits_rows"]
    assert entry["impl"], "the kernel is the base's own"
    assert entry["same"] and entry["pickled"], "each way of finding the class finds the same one"
    assert set(entry["valid"]) >= {"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"}


def test_flashinfers_buffer_of_pages_has_room_for_the_pages_of_virtual_rows_and_no_more():
    """At 1M tokens. ``max_num_seqs`` rows of 1M tokens each took 185 MB and 940 MB."""
    tokens, page_size, max_model_len = 8192, 16, 1 << 20
    expected = {64: 51e6, 1024: 806e6}
    found = run_job("flashinfer_job", json.dumps([(number, tokens, page_size, max_model_len) for number in expected]))
    for (number, num_bytes), sizes in zip(expected.items(), found, strict=True):
        rows, pages = virtual_bounds(make_scheduler_config(number, tokens), max_model_len, page_size)
        star = sizes["star"]
        assert (star["rows"], star["row_starts"]) == (rows, rows + 1)
        assert pages <= star["pages"] < pages + rows
        assert star["pages"] * 4 < num_bytes
        assert sizes["plain"]["pages"] == number * max_model_len // page_size
        assert sizes["configured"] == {"max_num_seqs": number, "max_model_len": max_model_len}, "a copy is changed"
