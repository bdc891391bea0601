"""An engine with one feature more, which is added by a folder and a line; prints one line (tests/forks.py).

The argument is the checkpoint's path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.parity.engine_job import RESULT, leave_out_compilation

PROMPT = {"prompt_token_ids": [5 + index % 200 for index in range(900)]}


def rows(worker):
    """What the toy's part of a worker has seen: (overlap of the plan, tokens) of each row."""
    from starling.features.toy.worker import Toy

    return [(plan.overlap_size, tokens) for plan, tokens in worker.part(Toy).seen]


def main() -> None:
    from vllm import SamplingParams

    from starling import LLM, features

    features.__path__ = [*features.__path__, str(Path(__file__).parent / "toys")]
    before = features.FEATURES.index("star")  # the toy bounds chunks
    features.FEATURES = (*features.FEATURES[:before], "toy", *features.FEATURES[before:])
    leave_out_compilation()
    options = {"mode": "on", "block_size": 256, "query_tokens": 37}
    llm = LLM(sys.argv[1], star=options, dtype="float32", enforce_eager=True, block_size=32)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    print(RESULT + json.dumps({"plan": output.plan, "rows": llm.collective_rpc(rows)[0]}), flush=True)
