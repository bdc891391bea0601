"""A vLLM engine in a separate process, whose generation the benchmarks time.

Run as a module, this file is that process. It reads requests and writes responses, each as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Child:
    """A process that reads requests and writes responses, each as a line of JSON. It stops on exit.

    Args:
        name: name in messages of what runs in it.
        options: options of Popen.

    Attributes:
        ready: first line that it writes, once it is ready.
    """

    def __init__(self, name: str, command: Sequence[str], **options: Any) -> None:
        self.name = name
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def __enter__(self) -> Self:
        self.ready = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(60)

    def ask(self, **fields: Any) -> dict[str, Any]:
        """Return the response to a request (raises RuntimeError: the process ended)."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(fields) + "\n")
        self.child.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with exit code {self.child.wait(60)}")
        return json.loads(line)


class Engine(Child):
    """The engine starts on entry and stops on exit.

    Args:
        model: path of the checkpoint.
        env: additional environment of the engine's process.
        timed_attention: True to time the attention layers too.
        arguments: arguments of vllm.LLM.
    """

    def __init__(
        self,
        model: Path,
        *,
        env: dict[str, str] | None = None,
        timed_attention: bool = False,
        **arguments: Any,
    ):
        llm = {"model": str(model), "enforce_eager": True, "enable_prefix_caching": False} | arguments
        job = json.dumps({"llm": llm, "timed_attention": timed_attention})
        # Timing the attention layers sends a function to the workers. vLLM allows that with this variable only.
        environment = os.environ | QUIET | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | (env or {})
        super().__init__("the engine", [sys.executable, "-m", "benchmarks.engine", job], cwd=ROOT, env=environment)

    @property
    def cache_tokens(self) -> int:
        """Return the number of tokens that the KV cache holds, as vLLM reports it."""
        return self.ready["cache_tokens"]

    def generate(
        self,
        ids: list[int],
        extra_args: dict[str, Any] | None = None,
        max_tokens: int = 1,
        cpu_attention: str | None = None,
    ) -> dict[str, Any]:
        """Generate from a prompt; with ``max_tokens`` 1, ``seconds`` is the time to the first token.

        Args:
            ids: token ids of the prompt.
            extra_args: options of the request.
            cpu_attention: the attention op to use from now on, a value of the option of that name, or None for the same
                as before.

        Returns:
            {"seconds", "attention_seconds", "token_ids", "sources": where its documents came from}.

        Raises:
            RuntimeError: the engine's process ended.
        """
        return self.ask(batch=[ids], extra_args=extra_args or None, max_tokens=max_tokens, cpu_attention=cpu_attention)

    def generate_batch(self, batch: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Generate as ``generate``, for prompts that arrive at once; ``token_ids`` are those of the first prompt."""
        return self.ask(batch=batch, extra_args=None, max_tokens=max_tokens, cpu_attention=None)


def time_attention(worker: Any) -> None:
    """Sum up the time of the attention layers from now on; runs in a worker."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    impl: Any = AttentionBackendEnum.CPU_ATTN.get_class().get_impl_cls()
    forward = impl.forward
    worker.attention_seconds = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = forward(*args, **kwargs)
        worker.attention_seconds += time.perf_counter() - start
        return out

    impl.forward = timed


def set_cpu_attention(worker: Any, setting: str) -> None:
    """Use this attention op from now on; runs in a worker."""
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        layer.impl.setting = setting


def take_attention_seconds(worker: Any) -> float:
    """Return the seconds of the attention layers since the last call; runs in a worker."""
    seconds, worker.attention_seconds = worker.attention_seconds, 0.0
    return seconds


def main() -> None:
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other prints to standard output must not mix with the responses
    job = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, **job["llm"])
    if job["timed_attention"]:
        llm.collective_rpc(time_attention)
    ready = {"cache_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens}
    print(json.dumps(ready), file=responses, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        params = SamplingParams(
            max_tokens=request["max_tokens"], temperature=0, ignore_eos=True, extra_args=request["extra_args"]
        )
        if request["cpu_attention"]:
            llm.collective_rpc(set_cpu_attention, args=(request["cpu_attention"],))
        start = time.perf_counter()
        prompts = [{"prompt_token_ids": ids} for ids in request["batch"]]
        output, *_ = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        attention = llm.collective_rpc(take_attention_seconds)[0] if job["timed_attention"] else None
        response = {
            "seconds": seconds,
            "attention_seconds": attention,
            "token_ids": list(output.outputs[0].token_ids),
            "sources": getattr(output, "document_sources", None),
        }
        print(json.dumps(response), file=responses, flush=True)


if __name__ == "__main__":
    main()
