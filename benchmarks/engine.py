"""A vLLM engine in a process of its own, driven by prompts of token ids; what the benchmarks time.

Run as a module it is that process: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Engine:
    """Starts on entry, stops on exit. ``cache_tokens``: what its KV cache holds, as vLLM reports it.

    Args:
        arguments: of vllm.LLM, plus ``timed_attention``: whether to time the attention layers too.
        env: environment on top of ours, for the engine alone.
    """

    def __init__(
        self,
        model: Path,
        *,
        env: dict[str, str] | None = None,
        timed_attention: bool = False,
        **arguments: Any,
    ):
        job = {"model": str(model), "enforce_eager": True, "enable_prefix_caching": False} | arguments
        self.child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.engine",
                json.dumps({"llm": job, "timed_attention": timed_attention}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Timing the attention layers hands the workers a function, which vLLM allows only when told so.
            env=os.environ | QUIET | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | (env or {}),
        )

    def __enter__(self) -> Engine:
        self.cache_tokens: int = self._read()["cache_tokens"]
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(60)

    def generate(
        self,
        ids: list[int],
        extra_args: dict[str, Any] | None = None,
        max_tokens: int = 1,
        cpu_attention: str | None = None,
    ) -> dict[str, Any]:
        """{"seconds", "attention_seconds", "token_ids"}; with ``max_tokens`` 1, seconds to the first token.

        Args:
            cpu_attention: the op to attend with from now on, as the option of that name; None: as before.
        """
        return self._ask(batch=[ids], extra_args=extra_args or None, max_tokens=max_tokens, cpu_attention=cpu_attention)

    def generate_batch(self, batch: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """The same for prompts that come all at once; token_ids are the first one's."""
        return self._ask(batch=batch, extra_args=None, max_tokens=max_tokens, cpu_attention=None)

    def _ask(self, **job: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(job) + "\n")
        self.child.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine process ended with exit code {self.child.wait(60)}")
        return json.loads(line)


def time_attention(worker: Any) -> None:
    """In a worker: add up the time that attention layers take."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    impl = AttentionBackendEnum.CPU_ATTN.get_class().get_impl_cls()
    forward = impl.forward
    worker.attention_seconds = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = forward(*args, **kwargs)
        worker.attention_seconds += time.perf_counter() - start
        return out

    impl.forward = timed


def use_op(worker: Any, setting: str) -> None:
    """In a worker: attend with that op from now on."""
    from attention_backends.kernels import cpu_impl

    cpu_impl.use(setting)


def take_attention_seconds(worker: Any) -> float:
    """In a worker: the time since this was last asked."""
    seconds, worker.attention_seconds = worker.attention_seconds, 0.0
    return seconds


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints to standard output must not land among the answers
    job = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, **job["llm"])
    if job["timed_attention"]:
        llm.collective_rpc(time_attention)
    ready = {"cache_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        prompt = json.loads(line)
        params = SamplingParams(
            max_tokens=prompt["max_tokens"], temperature=0, ignore_eos=True, extra_args=prompt["extra_args"]
        )
        if prompt["cpu_attention"]:
            llm.collective_rpc(use_op, args=(prompt["cpu_attention"],))
        start = time.perf_counter()
        prompts = [{"prompt_token_ids": ids} for ids in prompt["batch"]]
        output, *_ = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        attention = llm.collective_rpc(take_attention_seconds)[0] if job["timed_attention"] else None
        answer = {
            "seconds": seconds,
            "attention_seconds": attention,
            "token_ids": list(output.outputs[0].token_ids),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
