"""Reports of a started engine core to its fronts: facts that it alone knows, and a front needs to plan requests.

A report is a dict of msgpack's types. It goes out with what vLLM's engine core sends each front by itself, which has no
field of a plugin's own. All of this goes when it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import msgspec

from starling.vllm_compat.patching import Original, touches, wrap

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
