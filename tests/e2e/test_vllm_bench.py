"""vLLM's own benchmark tools, as they are, on Starling: counts, not times."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.e2e

PROMPTS, TOKENS, NEW = 5, 600, 4
STAR = {"star": "on", "star_block_size": 128, "star_query_tokens": 40}


def vllm_bench(*arguments: str) -> str:
    """Run `vllm bench ...` in the environment of the tests; its output."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm")), "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def counters(server) -> dict[str, float]:
    text = httpx.get(f"{server.http}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(starling:\S+) (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("options", [{}, STAR], ids=["dense", "star"])
def test_bench_serve(server, model, tmp_path, options):
    """The JSON is complete, and the rows that the kernel got are star's exactly where star was asked for."""
    before = counters(server)
    vllm_bench(
        *("serve", "--backend", "openai", "--base-url", server.http, "--endpoint", "/v1/completions"),
        *("--model", server.model, "--tokenizer", str(model), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(TOKENS), "--random-output-len", str(NEW), "--num-prompts", str(PROMPTS)),
        *("--extra-body", json.dumps({"vllm_xargs": options})),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == PROMPTS
    assert result["total_output_tokens"] == PROMPTS * NEW
    grown = {name: value - before[name] for name, value in counters(server).items()}
    asked, other = ("star", "dense") if options else ("dense", "star")
    assert grown[f'starling:requests_total{{attention="{asked}"}}'] >= PROMPTS
    assert grown[f'starling:requests_total{{attention="{other}"}}'] == 0
    context_tokens = grown["starling:context_tokens_total"]
    assert context_tokens >= PROMPTS * (TOKENS - 40 - 128) if options else context_tokens == 0
    assert grown["starling:keys_attended_total"] < grown["starling:keys_dense_total"] or not options


def test_bench_throughput(model, tmp_path):
    """With the plugin activated, star on: every prompt completes, and vLLM's log says what was in force."""
    output = vllm_bench(
        *("throughput", "--model", str(model), "--dtype", "float32", "--enforce-eager", "--block-size", "32"),
        *("--dataset-name", "random", "--random-input-len", str(TOKENS), "--random-output-len", str(NEW)),
        *("--num-prompts", str(PROMPTS), "--output-json", str(tmp_path / "result.json")),
        *("--additional-config", json.dumps({"starling": {"star": {"mode": "on", "block_size": 128}}})),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_requests"] == PROMPTS
    assert result["total_num_tokens"] >= PROMPTS * TOKENS
    assert "Starling is activated; star defaults: {'mode': 'on'" in output
