"""One `starling.LLM`, and what its requests with and without star options give; prints one line (tests/forks.py).

The argument is the checkpoint's path.
"""

from __future__ import annotations

import json
import sys

from tests.parity.engine_job import RESULT, leave_out_compilation

PROMPT = {"prompt_token_ids": [5 + index % 200 for index in range(900)]}
CHAT = [{"role": "user", "content": "a b c d " * 300}]


def main() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from starling import LLM, StarOptions

    leave_out_compilation()
    sizes = {"block_size": 256, "query_tokens": 37}
    more = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
    more["additional_config"] = {"starling": {"star_quality_sizes": "fast=n/5,balanced=dense,careful=dense"}}
    llm = LLM(sys.argv[1], star=StarOptions(mode="off", anchor_size=0, overlap_size=0), **more)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    ways = {
        "none": None,
        "word": "on",
        "fields": {"mode": "on", **sizes},
        "flat": {"star": "on", "star_block_size": 256, "star_query_tokens": 37},
        "options": StarOptions(mode="on", **sizes),
        "quality": StarOptions(mode="on", quality="fast"),
    }
    outputs = {name: llm.generate(PROMPT, params, star=star, use_tqdm=False)[0] for name, star in ways.items()}
    outputs["chat"] = llm.chat(CHAT, params, star=ways["options"], use_tqdm=False)[0]
    outputs["each"] = llm.generate([PROMPT, PROMPT], [params, params], star="on", use_tqdm=False)[1]
    outputs["default"] = llm.generate(PROMPT, star="on", use_tqdm=False)[0]
    refused = {}
    for name, star in {"name": {"blok_size": 256}, "value": "onn", "page": {"mode": "on", "block_size": 100}}.items():
        try:
            llm.generate(PROMPT, params, star=star, use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            refused[name] = str(error)
    result = {
        "plans": {name: output.plan for name, output in outputs.items()},
        "sources": [output.document_sources for output in outputs.values()],
        "tokens": {name: len(output.outputs[0].token_ids) for name, output in outputs.items()},
        "params": params.extra_args,
        "refused": refused,
    }
    print(RESULT + json.dumps(result), flush=True)
