"""The engine core: its utilities, what it reports to fronts, its check of KV memory, its end with its parent."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import msgspec

from starling.vllm_compat.metrics import DIRECTORY_ENV
from starling.vllm_compat.patching import Original, touches, wrap

logger = logging.getLogger("vllm.starling")

PARENT_CHECK_SECONDS = 1.0
END_SECONDS = 10.0
"""Seconds that a process whose parent was killed may take to end its own children."""


@touches("vllm.config.model.ModelConfig.{max_model_len, original_max_model_len}")
def divide_kv_memory_check(by: Callable[[Any], int]) -> None:
    """Let an engine core start whose KV memory holds max_model_len / ``by(vllm_config)`` tokens.

    vLLM asks that one engine's memory holds a request of max_model_len tokens. Requests are still held against that
    length. Goes when vLLM knows of requests whose KV is divided among engines.
    """
    from vllm.v1.engine import core

    @wrap(core, "get_kv_cache_configs")
    def get_kv_cache_configs(original: Original, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model, parts = vllm_config.model_config, by(vllm_config)
        if parts == 1 or model.original_max_model_len == -1:  # the latter: vLLM finds what fits in one engine
            return original(vllm_config, *args, **kwargs)
        length, model.max_model_len = model.max_model_len, -(-model.max_model_len // parts)
        try:
            return original(vllm_config, *args, **kwargs)
        finally:
            model.max_model_len = length


@touches("vllm.v1.engine.core.EngineCoreProc._handle_client_request")
def add_core_utility(name: str, function: Callable[..., Any]) -> None:
    """Let a front call ``function(engine_core, *args)`` in the engine-core process, by front.call_engine_core.

    Only that process has the scheduler, and vLLM hands nothing of it to the front but token outputs and
    averages. A utility call looks its name up on the EngineCore, and runs between two steps, so it sees the
    scheduler at rest. It takes and returns what msgpack has: None, bool, int, float, str, lists and dicts of
    them (tuples come back as lists). Called in the engine core alone. Goes when vLLM lets a plugin register
    utilities.

    Raises:
        RuntimeError: vLLM has a method of that name, which this would replace.
    """
    from vllm.v1.engine.core import EngineCore

    current = getattr(EngineCore, name, None)
    if current is not None and not getattr(current, "__starling__", False):
        raise RuntimeError(f"vLLM's EngineCore has a method {name!r} of its own")
    function.__starling__ = True  # type: ignore[attr-defined]
    setattr(EngineCore, name, function)


WorkerCall = Callable[[Any, Any], None]

_worker_calls: list[WorkerCall] = []


def on_worker_call(callback: WorkerCall) -> None:
    """Let ``callback(engine_core, method)`` be called before a front's call of a method of all workers.

    vLLM's own ways to change weights while a server runs (its RL endpoints, /collective_rpc) come by here, and those of
    worker extensions. Calls that Starling makes in the engine core do not. Only called in an engine core where Starling
    is activated. Goes when vLLM says that weights have changed.

    Args:
        callback: ``method`` is the name of the workers' method, or a function.
    """
    from vllm.v1.engine.core import EngineCore

    @wrap(EngineCore, "collective_rpc")
    def collective_rpc(original: Original, self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        for each in _worker_calls:
            each(self, method)
        return original(self, method, *args, **kwargs)

    if callback not in _worker_calls:
        _worker_calls.append(callback)


def amend_requests(amend: Callable[[Any], Any]) -> None:
    """Let ``amend(engine_core_request)`` replace each request that reaches this process's engine core.

    The front's own view of the request stays: the length of its prompt, usage and admission. Only called in an engine
    core where Starling is activated. Goes when a scheduler may change a request before its pages are hashed.
    """
    from vllm.v1.engine.core import EngineCore

    @wrap(EngineCore, "preprocess_add_request")
    def preprocess_add_request(original: Original, self: Any, request: Any) -> Any:
        return original(self, amend(request))


def end_children_with_parent() -> None:
    """Let engine cores, and the coordinator of replicas, end soon after the process that starts them from now on.

    That is the API server or its launcher. vLLM ends them when the API server ends in order. One that is killed leaves
    them and their workers, with all of their memory; an engine core that is starting waits minutes for it. The parent's
    process id is polled: with fork, a sibling may hold the other end of multiprocessing's own pipe. Goes when vLLM's
    engine cores and coordinator look after their parent.
    """
    from vllm.v1.engine.coordinator import DPCoordinatorProc
    from vllm.v1.engine.core import EngineCoreProc

    if EngineCoreProc.run_engine_core is not run_engine_core:
        run_engine_core.__wrapped__ = EngineCoreProc.run_engine_core  # type: ignore[attr-defined]
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    if DPCoordinatorProc.run_coordinator is not run_coordinator:
        run_coordinator.__wrapped__ = DPCoordinatorProc.run_coordinator  # type: ignore[attr-defined]
        DPCoordinatorProc.run_coordinator = staticmethod(run_coordinator)  # type: ignore[method-assign]


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """Run vLLM's EngineCoreProc.run_engine_core; a function of a module, since a spawned process gets its name only."""
    from vllm.v1.engine.core import EngineCoreProc

    _watch_parent()
    getattr(run_engine_core, "__wrapped__", EngineCoreProc.run_engine_core)(*args, **kwargs)


def run_coordinator(*args: Any, **kwargs: Any) -> None:
    """Run vLLM's DPCoordinatorProc.run_coordinator, as ``run_engine_core``."""
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    _watch_parent()
    getattr(run_coordinator, "__wrapped__", DPCoordinatorProc.run_coordinator)(*args, **kwargs)


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.pid,), name="starling-parent", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    logger.error("process %d, which started this one, has ended: this one ends too", parent)
    if DIRECTORY_ENV in os.environ:
        shutil.rmtree(os.environ[DIRECTORY_ENV], ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    for child in multiprocessing.active_children():  # workers that are still loading do not look after their parent
        child.kill()
    os._exit(1)


Report = dict[str, Any]

FIELD = "starling"
REPORTS = "starling_reports"
"""The attribute of a VllmConfig that holds the reports of the engine cores that have started."""


def engine_reports(vllm_config: Any) -> list[Report]:
    """Return the reports of an engine's cores, one for each replica; none before they have started."""
    return list(getattr(vllm_config, REPORTS, ()))


def add_report(vllm_config: Any, report: Report) -> None:
    """Keep the report of one more engine core."""
    setattr(vllm_config, REPORTS, [*engine_reports(vllm_config), report])


@touches("vllm.v1.engine.core.EngineCore.vllm_config")
def send_report(make_report: Callable[[Any], Report | None]) -> None:
    """Let each engine core of this process report ``make_report(engine_core)``, if any, once its scheduler is made.

    An engine inside the user's process shares its configuration with its front, so nothing is sent.
    """
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    @wrap(EngineCore, "_initialize_effective_attention_block_size")
    def _initialize_effective_attention_block_size(original: Original, self: Any) -> None:
        original(self)
        report = make_report(self)
        if report is not None:
            add_report(self.vllm_config, report)

    @wrap(EngineCoreProc, "_make_ready_response")
    def _make_ready_response(original: Original, self: Any) -> Any:
        response, reports = original(self), engine_reports(self.vllm_config)
        return _with_report(response, reports[-1]) if reports else response


@touches("vllm.v1.engine.core_client.MPClient.vllm_config")
def receive_reports() -> None:
    """Let this process's fronts keep the reports of their engine cores. An engine core of vLLM's own sends none."""
    from vllm.v1.engine.core_client import MPClient

    @wrap(MPClient, "_apply_ready_response")
    def _apply_ready_response(original: Original, self: Any, payload: bytes) -> None:
        original(self, payload)
        report = msgspec.msgpack.decode(payload).get(FIELD) if payload else None
        if report is not None:
            add_report(self.vllm_config, report)


def _with_report(response: Any, report: Report) -> Any:
    """Return vLLM's ready response with one more field, which vLLM's own decoder leaves out."""
    base = type(response)
    with_field = make_dataclass(base.__name__, [(FIELD, dict)], bases=(base,), kw_only=True)
    return with_field(**vars(response), **{FIELD: report})
