"""Calls of engine jobs: whether a replica notes a released hold before the forward that may write to its pages."""

from __future__ import annotations

from typing import Any

from starling.features.replicas.scheduler_connector import Hold

RELEASE_AND_NOTE: list[Any] = [
    {"call": "tests.parity.released_pages:record"},
    {"scheduler": "tests.parity.released_pages:release"},
    [{"ids": [1, 2, 3], "max_tokens": 2}],
    {"scheduler": "tests.parity.released_pages:check"},
]
"""Batches of an engine job that fails where the note comes later. The third one has a result."""

EVENTS: list[str] = []


def record(worker: Any) -> None:
    """From now on, note when holds are noted as released, and when a forward of the model is launched."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    holds = get_kv_transfer_group().connector_worker.reader.holds
    note = holds.note_released

    def note_released(numbers: list[int]) -> None:
        EVENTS.extend(f"hold {number}" for number in numbers)
        note(numbers)

    holds.note_released = note_released
    worker.get_model().register_forward_pre_hook(lambda *_: EVENTS.append("forward"))


def release(scheduler: Any) -> None:
    side = scheduler.connector.connector_scheduler
    side.holds["part"] = Hold(1, [])
    side.release(["part"])


def check(scheduler: Any) -> None:
    assert EVENTS[:2] == ["hold 1", "forward"], EVENTS
