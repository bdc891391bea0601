"""An engine with some of the features; prints one line (tests/forks.py).

The arguments are the checkpoint's path and the names of the features, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.parity.engine_job import RESULT, leave_out_compilation

IDS = [5 + index % 200 for index in range(900)]
STAR = {"star": "on", "star_block_size": 256, "star_query_tokens": 37}
PROMPTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "star": STAR | {"star_overlap_size": 0, "star_dense_heads": 0},
    "documents": STAR | {"star_segments": [0, 100, 300, 500, 800]},
    "dense heads": STAR | {"star_dense_heads": 0.25},
}


def main() -> None:
    from vllm import SamplingParams

    from starling import LLM, features

    features.FEATURES = tuple(json.loads(sys.argv[2]))
    leave_out_compilation()
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        scores.write_text(json.dumps({"scores": [[0.4, 0.1], [0.2, 0.3]]}))
        entry = {"starling": {"star_heads": str(scores)}}
        llm = LLM(sys.argv[1], additional_config=entry, dtype="float32", enforce_eager=True, block_size=32)
    found = {}
    for name, options in PROMPTS.items():
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=0, extra_args=dict(options))
        (output,) = llm.generate([{"prompt_token_ids": IDS}], params, use_tqdm=False)
        (choice,) = output.outputs
        logprobs = [of_token[token].logprob for token, of_token in zip(choice.token_ids, choice.logprobs, strict=True)]
        found[name] = {"plan": output.plan, "tokens": list(choice.token_ids), "logprobs": logprobs}
    core = llm.llm_engine.engine_core.engine_core
    hooks = sorted(type(part).__name__ for part in core.scheduler.parts)
    print(RESULT + json.dumps({"answers": found, "hooks": hooks}), flush=True)
