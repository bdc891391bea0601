"""Runs engine jobs, and the independent reference that the tests compare them with."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from starling.lab.selftest.masks import Heads, masks_by_head, star_mask
from tests.forks import FORK_SHIM, PRELOADED, ROOT, path_with, run_in_fork
from tests.parity.engine_job import RESULT

OF_ENGINES = (PRELOADED, "vllm:LLM", "vllm:SamplingParams")
KV_CACHE_BYTES = 1 << 28
V2_SHIM = ROOT / "tests" / "v2_shim"
OLDER_PROCESSOR = ROOT / "tests" / "older_processor"
OLDER_PROCESSORS = [
    name
    for name, is_older in (
        ("avx512", torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        ("avx2", torch.cpu._is_avx512_supported()),
    )
    if is_older
]
"""What `older_env` takes: the processors that have fewer features than this one, and other code for that."""
NEEDS_FP8 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 cache on a CPU needs AVX-512")
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def run_engine(
    model: Path,
    batches: list[list[dict] | dict],
    *,
    env: dict[str, str] | None = None,
    star: dict | None = None,
    **engine: Any,
) -> dict:
    """Run the batches on one engine; engine_job.py describes ``batches`` and the result.

    An engine of one rank runs in the process of the job, other engines in forks of it.

    Args:
        model: path of the checkpoint.
        env: additional environment of the engine's process.
        star: the star options of the engine, by their flat names.
        engine: further arguments of vllm.LLM.
    """
    arguments = {"model": str(model), "dtype": "float32", "enforce_eager": True, "block_size": 32}
    arguments["kv_cache_memory_bytes"] = KV_CACHE_BYTES
    arguments["additional_config"] = {"starling": star or {}}
    job = json.dumps({"engine": arguments | engine, "batches": batches})
    ranks = engine.get("tensor_parallel_size", 1)
    with cores(ranks) as bound:
        of_job = {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1))}
        of_job["VLLM_CPU_KVCACHE_SPACE"] = None  # it is an argument, and fractions of a GiB are enough
        before = env or {"PYTHONPATH": path_with(FORK_SHIM)}
        done = run_in_fork("tests.parity.engine_job:main", job, imports=OF_ENGINES, before=before, env=of_job)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-4000:]}{done.stderr[-8000:]}"
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


@contextmanager
def cores(ranks: int) -> Iterator[str]:
    """Lock one core per rank among the workers of ``pytest -n``; yields a value for VLLM_CPU_OMP_THREADS_BIND.

    Two engines on one core would wait for each other's spinning threads.
    """
    available = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(available)
    locked = [available[(worker + rank) % len(available)] for rank in range(ranks)]
    with ExitStack() as locks:
        for core in sorted(set(locked)):
            locks.enter_context(FileLock(Path(tempfile.gettempdir()) / f"starling-tests-core{core}.lock"))
        yield "|".join(map(str, locked))


def v2_env() -> dict[str, str]:
    """The environment for the V2 model runner on CPU, with its Triton kernels under the interpreter."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": path_with(V2_SHIM), "TRITON_INTERPRET": "1"}


def older_env(processor: str) -> dict[str, str]:
    """The environment in which a process, and what it compiles, runs as on one of ``OLDER_PROCESSORS``."""
    limits = {"ATEN_CPU_CAPABILITY": processor, "ONEDNN_MAX_CPU_ISA": processor.upper().replace("512", "512_CORE")}
    compiler = {"OLDER_PROCESSOR": processor, "CXX": str(OLDER_PROCESSOR / "c++")}
    return limits | compiler | {"PYTHONPATH": path_with(OLDER_PROCESSOR)}


@functools.cache
def load_reference(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' own model with eager attention. It shares no code with vLLM and Starling."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()


def reference_logprobs(
    model: Path, ids: list[int], mask: torch.Tensor | None, dtype: Any = torch.float32, dense_heads: Heads = ()
) -> torch.Tensor:
    """(len(ids) - 1,) log-probability of each of ``ids[1:]``; the arguments are those of ``reference_scores``."""
    return reference_scores(model, ids, mask, dtype, dense_heads).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def reference_scores(
    model: Path, ids: list[int], mask: torch.Tensor | None, dtype: Any = torch.float32, dense_heads: Heads = ()
) -> Any:
    """(len(ids) - 1, vocabulary) log-probability of each token in the places of ``ids[1:]``.

    Args:
        model: path of the checkpoint.
        ids: token ids.
        mask: (len(ids), len(ids)) bool, which key (column) a query (row) sees; None for the causal mask.
        dtype: of the computation.
        dense_heads: the (layer, KV head)s that see everything before them, whatever the mask.
    """
    reference = load_reference(model, dtype)
    if mask is None:
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    with torch.no_grad(), masks_by_head(reference, mask, dense_heads):
        logits = reference(torch.tensor([ids]), attention_mask=bias[None, None], use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1)


def check_greedy(tokens: list[int], scores: torch.Tensor, error: float) -> None:
    """Assert that an engine of low precision took the reference's first candidates, as far as rounding lets it.

    Each of the engine's log-probabilities is within ``error`` of the reference's, so no token that it takes is further
    than twice that behind the first one. Two outputs of one prompt may differ where two candidates are that near, so in
    low precision no test compares them. Outputs in float32 have to be equal.

    Args:
        scores: (tokens, vocabulary) the reference's log-probabilities in the places of the tokens.
    """
    behind = scores.max(-1).values - scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert behind.max() <= 2 * error, f"{tokens} are {behind.tolist()} behind the first candidates"


def mask_of(sizes: dict[str, int], num_tokens: int) -> torch.Tensor:
    """The explicit mask for the sizes ``block_size``, ``anchor_size``, ``overlap_size`` and ``context_end``."""
    return star_mask(num_tokens, **sizes)


def star(block_size: int, query_tokens: int, anchor_size: int | None = None, overlap_size: int = 0) -> dict:
    """The options of a star request. Without an anchor, A is B less the overlap: the paper's A = B without one."""
    options = {"star": "on", "star_block_size": block_size, "star_query_tokens": query_tokens}
    options |= {} if anchor_size is None else {"star_anchor_size": anchor_size}
    return options | {"star_overlap_size": overlap_size}


def star_sizes(options: dict, num_prompt_tokens: int) -> dict[str, int]:
    """The sizes that ``mask_of`` takes, computed from the options independently of the plan."""
    block_size = options["star_block_size"]
    # Without an overlap in the options, as a client would send them: the anchor is an eighth of the block.
    overlap_size = options.get("star_overlap_size", block_size - block_size // 8)
    return {
        "block_size": block_size,
        "anchor_size": options.get("star_anchor_size", block_size - overlap_size),
        "overlap_size": overlap_size,
        "context_end": num_prompt_tokens - options["star_query_tokens"],
    }


def max_gap(got: list[float], expected: torch.Tensor) -> float:
    """Largest absolute difference. Asserts that the lengths are equal."""
    assert len(got) == len(expected)
    return (torch.tensor(got, dtype=expected.dtype) - expected).abs().max().item()
