"""What plans cost the answers of the demo model, and what work they take; prints one line (tests/forks.py).

``python -m tests.parity.gates_job`` writes gates.json anew.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from starling.lab.evaluation.tasks import TASKS
from tests.forks import ROOT
from tests.parity.engine_job import RESULT, leave_out_compilation

MODEL = ROOT / "models" / "smollm2-135m-instruct"
ADAPTER = ROOT / "examples" / "checkpoints" / f"adapter-{MODEL.name}"
STORED = Path(__file__).with_name("gates.json")
PAGE_SIZE = 32
ENGINE: dict[str, Any] = {
    "block_size": PAGE_SIZE,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 1 << 28,
}
QUESTIONS = ("niah_multikey_1", "niah_single_2", "vt", "moves")
SIZE = 24
"""Of the tasks: texts of about 400 tokens."""
STAR = {"star": "on", "star_dense_heads": 0}
DOCUMENTS = STAR | {"star_adapter": "off"}
PLANS: dict[str, dict[str, Any]] = {
    "dense": {"star": "off"},
    "star": STAR | {"star_block_size": 128, "star_overlap_size": 0},
    "star with dense heads": {"star": "on", "star_block_size": 128, "star_dense_heads": 0.25},
    "documents": DOCUMENTS,
    "documents with the adapter": STAR,
}


def main() -> None:
    print(RESULT + json.dumps(run()), flush=True)


def make_prompts(tokenizer: Any) -> list[dict[str, Any]]:
    """For each question, the pieces of its text, and what is behind them: the question and the right answer."""
    made = []
    for seed, name in enumerate(QUESTIONS):
        example = TASKS[name].make(random.Random(seed), SIZE)
        opening, context, question = example.text.split("\n\n")
        sentences = context.split(". ")
        texts = [". ".join(sentences[start : start + 8]) + ". " for start in range(0, len(sentences), 8)]
        pieces = [tokenizer(text).input_ids for text in (f"{opening}\n\n", *texts)]
        answer = tokenizer(example.answer).input_ids
        tail = tokenizer(f"\n\n{question}\n{example.answer_prefix}").input_ids + answer
        made.append({"pieces": pieces, "tail": tail, "answer": len(answer)})
    return made


def options_of(name: str, pieces: list[list[int]], tail: list[int]) -> dict[str, Any]:
    options = PLANS[name] | ({} if name == "dense" else {"star_query_tokens": len(tail)})
    starts = list(accumulate(map(len, pieces)))[:-1]
    return options | ({"star_segments": starts} if name.startswith("documents") else {})


def run() -> dict[str, Any]:
    """Return the loss of the right answers by plan, and the work by prompt.

    The loss is the mean of minus the log-probabilities of all answers' tokens. The work of a prompt is what grows with
    it alone: no time.
    """
    from vllm import SamplingParams

    from starling import LLM

    leave_out_compilation()
    counts: Counter[str] = Counter()
    count_calls(counts)
    llm = LLM(str(MODEL), additional_config={"starling": {"star_adapter": str(ADAPTER)}}, **ENGINE)
    prompts = make_prompts(llm.get_tokenizer())

    def ask(pieces: list[list[int]], tail: list[int], name: str, salt: str, **params: Any) -> Any:
        ids = [token for piece in (*pieces, tail) for token in piece]
        fields = {"max_tokens": 1, "temperature": 0, "extra_args": options_of(name, pieces, tail)} | params
        prompt = {"prompt_token_ids": ids, "cache_salt": salt}
        (output,) = llm.generate([prompt], SamplingParams(**fields), use_tqdm=False)
        return output

    losses = {}
    for name in PLANS:
        found = []
        for prompt in prompts:
            output = ask(prompt["pieces"], prompt["tail"], name, "losses", prompt_logprobs=0)
            rows = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[-prompt["answer"] :]
            found += [-of_token[token].logprob for token, of_token in rows]
        losses[name] = sum(found) / len(found)

    work = {}
    head, *documents = prompts[0]["pieces"]
    for name in PLANS:
        for order, pieces in (("cold", documents), ("in another order", documents[::-1])):
            counts.clear()
            output = ask([head, *pieces], prompts[0]["tail"], name, name)
            work[f"{name}, {order}"] = {
                "computed tokens": len(output.prompt_token_ids) - output.num_cached_tokens,
                "attended keys": output.plan.get("keys_attended", 0),
            } | dict(counts)
    return {"losses": losses, "work": work}


def count_calls(counts: Counter[str]) -> None:
    """Count the calls of attention ops on a CPU, and the bytes of each plan that a front sends.

    Batches that vLLM's op can compute run on it: by default the processor decides which op is the faster one.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from starling.attention_backends.kernels.cpu import paged_op
    from starling.attention_backends.star.cpu_impl import CpuImpl
    from starling.scheduler.planning.request_metadata import RequestMetadata

    class Ops:
        def __getattr__(self, name: str) -> Any:
            counts[f"calls of {name}"] += 1
            return getattr(built(), name)

    CpuImpl.uses_op = lambda *_: False  # type: ignore[method-assign]
    built = paged_op.built_op
    paged_op.built_op = lambda: Ops() if built() is not None else None
    forward = CPUAttentionBackendImpl.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["calls of vLLM's attention"] += 1
        return forward(*args, **kwargs)

    CPUAttentionBackendImpl.forward = counted
    to_wire = RequestMetadata.to_wire

    def sized(metadata: Any) -> Any:
        wire = to_wire(metadata)
        counts["bytes of the plan"] += len(msgspec.msgpack.encode(wire))
        return wire

    RequestMetadata.to_wire = sized


if __name__ == "__main__":
    STORED.write_text(json.dumps(run(), indent=1) + "\n")
