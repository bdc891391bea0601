"""Runs engines on the fake GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.forks import run_in_fork
from tests.gpu_shim.job import STEPS_OF
from tests.parity.engine_job import RESULT
from tests.parity.harness import v2_env

MARK = {"call": "tests.gpu_shim.worker:next_batch"}
# The first makes the process one with a GPU, so it has to be first.
IMPORTS = ("tests.gpu_shim.start", "vllm:LLM", "vllm:SamplingParams", "vllm.lora.request", "tests.gpu_shim.worker")
# A wait for the GPU in a step is an error. FlashInfer is not installed.
ENV = v2_env() | {"VLLM_GPU_SYNC_CHECK": "error", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
ENGINE = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 24,
    "attention_backend": "FLASH_ATTN",
    "enforce_eager": False,
    # torch's own functions in place of the kernels of vLLM's wheel for CUDA.
    "kernel_config": {
        "enable_jit_warmup": False,
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
    },
    "compilation_config": {
        "mode": 0,
        "custom_ops": ["none"],
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}


def run_gpu_engine(
    model: Path, batches: list[Any], *, star: dict | None = None, job: str = "job", runner: str = "v2", **engine: Any
) -> dict[str, Any]:
    """As ``run_engine`` of tests/parity, on a GPU that is not there.

    Args:
        job: the module of this package that runs the batches.
        runner: the model runner, "v1" or "v2".

    Returns:
        {"batches", "metrics", "steps"}: worker.py describes the steps, of which there is a list for each batch of
        prompts.
    """
    arguments = {"model": str(model), "additional_config": {"starling": star or {}}} | ENGINE | engine
    marked = [part for batch in batches for part in ([MARK, batch] if isinstance(batch, list) else [batch])]
    given = json.dumps({"engine": arguments, "batches": marked})
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0"}
    done = run_in_fork(f"tests.gpu_shim.{job}:main", given, imports=IMPORTS, before=ENV, env=env, seconds=600)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-3000:]}{done.stderr[-8000:]}"
    found: dict[str, Any] = {STEPS_OF: []} | {
        start: json.loads(line.removeprefix(start))
        for line in done.stdout.splitlines()
        for start in (RESULT, STEPS_OF)
        if line.startswith(start)
    }
    assert {step["runner"] for steps in found[STEPS_OF] for step in steps} <= {runner}
    return found[RESULT] | {"steps": found[STEPS_OF]}
