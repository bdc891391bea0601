"""vLLM's benchmark commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def is_bench(argv: Sequence[str]) -> bool:
    """Return whether a command line is `vllm bench ...`, by its first argument that is no option, as vLLM does."""
    return next((argument for argument in argv[1:] if not argument.startswith("-")), None) == "bench"


def add_bench_backend(name: str, request: Callable[..., Any]) -> None:
    """Let `vllm bench serve --backend name` send its requests by ``request``, a vLLM RequestFunc.

    vLLM's parser takes the choices of --backend from this table, and sampling options (--temperature ...) for the
    listed backends only; plugins are loaded while the parser of the first `vllm bench` command is made, before that
    of `serve`. Goes when vLLM lets a plugin register backends.
    """
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, OPENAI_COMPATIBLE_BACKENDS

    ASYNC_REQUEST_FUNCS[name] = request
    if name not in OPENAI_COMPATIBLE_BACKENDS:
        OPENAI_COMPATIBLE_BACKENDS.append(name)
