"""One vLLM engine in a process of its own: `python -m starling.lab.selftest.engine JOB.json` prints its results.

A job is {"engine": arguments of vllm.LLM, "batches": {name: [prompt, ...]}}. Batches run one after the other, the
prompts of a batch together. A prompt is {"ids", "max_tokens", "star": star options, "prompt_logprobs", "cold", "bare"}.
A cold prompt reads nothing from the prefix cache, and a bare one has no log-probabilities. The last line of standard
output has ``RESULT`` and then JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULT = "starling-selftest: "


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run the batches.

    Returns:
        {"environment", "batches": {name: {"outputs", "preemptions", "graphs", "memory"}}, "memory"}. "graphs" has the
        steps by the mode of their CUDA graphs, and "memory" what ``gpu_memory`` says of each rank: before all batches,
        and of each batch.
    """
    from vllm import LLM
    from vllm.v1.metrics.reader import Counter

    from starling.vllm_compat.engine_readings import count_graphs, gpu_memory

    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, cudagraph_metrics=True, seed=0, **job["engine"])
    graphs, memory = count_graphs(llm.llm_engine), llm.collective_rpc(gpu_memory)
    batches, before = {}, 0
    for name, prompts in job["batches"].items():
        outputs = run_batch(llm, prompts)
        counters = [metric for metric in llm.get_metrics() if isinstance(metric, Counter)]
        after = sum(counter.value for counter in counters if counter.name == "vllm:num_preemptions")
        taken = llm.collective_rpc(gpu_memory)
        batches[name] = {
            "outputs": outputs,
            "preemptions": after - before,
            "graphs": dict(graphs),
            "memory": taken,
        }
        graphs.clear()
        before = after
    return {"environment": environment(llm.llm_engine.vllm_config), "batches": batches, "memory": memory}


def run_batch(llm: Any, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Generate greedily for prompts together; the fields of ``read_output`` for each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=prompt["max_tokens"],
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=None if prompt.get("bare") else 2,
            prompt_logprobs=0 if prompt.get("prompt_logprobs") else None,
            skip_reading_prefix_cache=True if prompt.get("cold") else None,
            extra_args=prompt.get("star") or None,
        )
        for prompt in prompts
    ]
    tokens = [{"prompt_token_ids": prompt["ids"]} for prompt in prompts]
    return [read_output(output) for output in llm.generate(tokens, params, use_tqdm=False)]


def read_output(output: Any) -> dict[str, Any]:
    """Return tokens, log-probabilities and times of a request.

    ``margins`` has, for each generated token, how much more probable it is than the second best, in nats.
    ``adapter`` says whether the prompt ran with the server's, and ``stored`` how many tokens of documents came from its
    library.
    """
    (choice,) = output.outputs
    steps = list(zip(choice.logprobs, choice.token_ids, strict=True)) if choice.logprobs else []
    chosen = [step[token].logprob for step, token in steps]
    second = [max(entry.logprob for other, entry in step.items() if other != token) for step, token in steps]
    prompt = zip((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:], strict=False)
    times, count = output.metrics, len(choice.token_ids)
    plan, sources = getattr(output, "plan", None) or {}, getattr(output, "document_sources", None) or []  # not vLLM's
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": chosen,
        "margins": [best - other for best, other in zip(chosen, second, strict=True)],
        "prompt_logprobs": [step[token].logprob for step, token in prompt],
        "cached": output.num_cached_tokens,
        "adapter": bool(plan.get("adapter")),
        "stored": sum(document["host"] + document["storage"] for document in sources),
        "ttft": times.first_token_latency,
        "seconds_per_token": (times.last_token_ts - times.first_token_ts) / max(count - 1, 1),
    }


def environment(config: Any) -> dict[str, str]:
    """Return model runner, attention backend, KV layout, graph mode and dtypes of an engine."""
    from starling.vllm_compat.config import model_runner

    layers = config.compilation_config.static_forward_context
    backends = {layer.get_attn_backend().get_name() for layer in layers.values() if hasattr(layer, "get_attn_backend")}
    return {
        "runner": model_runner(config),
        "backend": ", ".join(sorted(backends)) or "in other processes",
        "layout": str(config.cache_config.kv_cache_layout),
        "graphs": "eager" if config.model_config.enforce_eager else config.compilation_config.cudagraph_mode.name,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_dtype": config.cache_config.cache_dtype,
        "page": f"{config.cache_config.block_size} tokens",
    }


if __name__ == "__main__":
    print("\n" + RESULT + json.dumps(run_job(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
