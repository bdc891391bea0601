"""Runs batches of token-id prompts through one vLLM engine, and prints the results. Runs in a fork (tests/forks.py).

A job, the argument, is {"engine": LLM arguments, "batches": [[prompt, ...], ...]}. A prompt is
{"ids", "extra_args", "max_tokens", "prompt_logprobs", "n", "lora": path of an adapter, ...}. Batches run one after
the other, the prompts of a batch together. A batch may also be one of the following, which have no result and need an
engine of one rank, which runs in the job's process:

- {"call": "module:function"}: the worker calls the function;
- {"chunk": tokens}: from now on a step computes at most these tokens;
- {"scheduler": "module:function"}: calls the function with the scheduler.

The result is a line of standard output that starts with RESULT: {"batches", "metrics"}. The metrics include Starling's
metrics of the cache, whose labels follow their names.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from typing import Any

import torch
from prometheus_client import REGISTRY

from tests.parity.scores import score_in_torch

RESULT = "starling-result: "


def make_params(prompt: dict, sampling_params: type):
    return sampling_params(
        max_tokens=prompt.get("max_tokens", 1),
        # Greedy unless the prompt has a seed. vLLM refuses temperature 0 with n > 1, and the sampler of V2 does not run
        # under Triton's interpreter.
        temperature=1 if "seed" in prompt or prompt.get("n", 1) > 1 else 0,
        top_k=1 if prompt.get("n", 1) > 1 else 0,
        seed=prompt.get("seed"),
        ignore_eos=True,
        logprobs=0,
        n=prompt.get("n", 1),
        prompt_logprobs=0 if prompt.get("prompt_logprobs") else None,
        extra_args=prompt.get("extra_args") or None,
        skip_reading_prefix_cache=prompt.get("cold"),
        **{name: prompt[name] for name in ("min_tokens", "stop_token_ids") if name in prompt},
        logit_bias={int(token): bias for token, bias in prompt.get("logit_bias", {}).items()} or None,
    )


def make_result(output) -> dict:
    chosen = output.outputs[0]
    prompt = output.prompt_logprobs
    return {
        "token_ids": list(chosen.token_ids),
        "all_token_ids": [list(choice.token_ids) for choice in output.outputs],
        "logprobs": [step[token].logprob for step, token in zip(chosen.logprobs, chosen.token_ids, strict=True)],
        "cached": output.num_cached_tokens,
        "prompt_logprobs": None
        if prompt is None
        else [step[token].logprob for step, token in zip(prompt[1:], output.prompt_token_ids[1:], strict=True)],
    }


def leave_out_compilation() -> None:
    """In an eager engine vLLM still compiles one function, the ranks of logprobs: for seconds, in each process."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # in the processes of ranks
    torch.compiler.set_stance("force_eager")


def main() -> None:
    end(run_job(json.loads(sys.argv[1])))


def end(llm: Any) -> None:
    """Leave an engine without its orderly end, which takes two seconds, if nothing of it outlives this process.

    Ranks do, and the memory of a library.
    """
    config = llm.llm_engine.vllm_config
    if config.parallel_config.world_size == 1 and config.kv_transfer_config is None:
        os._exit(0)


def run_job(job: dict) -> Any:
    """Run a job and print its result; returns the engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if job["engine"]["enforce_eager"]:
        leave_out_compilation()
    if os.environ.get("TRITON_INTERPRET") == "1":
        score_in_torch()
    llm = LLM(disable_log_stats=False, skip_tokenizer_init=True, **job["engine"])
    batches = []
    for batch in job["batches"]:
        if "scheduler" in batch:
            pkgutil.resolve_name(batch["scheduler"])(llm.llm_engine.engine_core.engine_core.scheduler)
            continue
        if isinstance(batch, dict):
            if "chunk" in batch:
                llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = batch["chunk"]
            else:
                llm.collective_rpc(pkgutil.resolve_name(batch["call"]))
            continue
        prompts = [{"prompt_token_ids": prompt["ids"]} for prompt in batch]
        params = [make_params(prompt, SamplingParams) for prompt in batch]
        loras = [LoRARequest("adapter", 1, prompt["lora"]) if prompt.get("lora") else None for prompt in batch]
        outputs = llm.generate(prompts, params, lora_request=loras if any(loras) else None, use_tqdm=False)
        batches.append([make_result(output) for output in outputs])
    prefixes = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "starling:requests", "vllm:spec_decode_num_")
    metrics = {m.name: m.value for m in llm.get_metrics() if m.name.startswith(prefixes) and hasattr(m, "value")}
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    metrics |= {
        " ".join([s.name, *s.labels.values()]): s.value for s in samples if s.name.startswith("starling:cache_")
    }
    print("\n" + RESULT + json.dumps({"batches": batches, "metrics": metrics}), flush=True)
    return llm
