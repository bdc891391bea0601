"""Runs batches of token-id prompts through one vLLM engine, in a process of its own, and prints the results.

A job on standard input, JSON: {"engine": LLM arguments, "batches": [[prompt, ...], ...]}; a prompt is
{"ids", "extra_args", "max_tokens", "prompt_logprobs", "n", "lora": path of an adapter, ...}. Batches run one after
the other, the prompts of a batch together. A batch may also be one of these, which have no result:
{"call": "module:function"}, which every worker runs (VLLM_ALLOW_INSECURE_SERIALIZATION=1), and {"chunk": tokens}, the
most that a step computes from now on (VLLM_ENABLE_V1_MULTIPROCESSING=0). The result is a line of standard output,
RESULT before it: {"batches", "metrics"}; of our metrics those of compressed caches, labels behind their names.
"""

from __future__ import annotations

import json
import pkgutil
import sys

from prometheus_client import REGISTRY

RESULT = "starling-result: "


def params_of(prompt: dict, sampling_params: type):
    return sampling_params(
        max_tokens=prompt.get("max_tokens", 1),
        # Greedy but with a seed. vLLM refuses temperature 0 with n > 1; V2's sampler does not run interpreted.
        temperature=1 if "seed" in prompt or prompt.get("n", 1) > 1 else 0,
        top_k=1 if prompt.get("n", 1) > 1 else 0,
        seed=prompt.get("seed"),
        ignore_eos=True,
        logprobs=0,
        n=prompt.get("n", 1),
        prompt_logprobs=0 if prompt.get("prompt_logprobs") else None,
        extra_args=prompt.get("extra_args") or None,
    )


def result_of(output) -> dict:
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


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(disable_log_stats=False, skip_tokenizer_init=True, **job["engine"])
    batches = []
    for batch in job["batches"]:
        if isinstance(batch, dict):
            if "chunk" in batch:
                llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = batch["chunk"]
            else:
                llm.collective_rpc(pkgutil.resolve_name(batch["call"]))
            continue
        prompts = [{"prompt_token_ids": prompt["ids"]} for prompt in batch]
        params = [params_of(prompt, SamplingParams) for prompt in batch]
        loras = [LoRARequest("adapter", 1, prompt["lora"]) if prompt.get("lora") else None for prompt in batch]
        outputs = llm.generate(prompts, params, lora_request=loras if any(loras) else None, use_tqdm=False)
        batches.append([result_of(output) for output in outputs])
    wanted = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "starling:requests", "vllm:spec_decode_num_")
    metrics = {m.name: m.value for m in llm.get_metrics() if m.name.startswith(wanted) and hasattr(m, "value")}
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    metrics |= {
        " ".join([s.name, *s.labels.values()]): s.value for s in samples if s.name.startswith("starling:cache_")
    }
    print("\n" + RESULT + json.dumps({"batches": batches, "metrics": metrics}), flush=True)


if __name__ == "__main__":
    main()
