"""The status of an asyncio upload that the server ends before its last piece."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

WAIT_SECONDS = 5.0
"""Seconds that a server's status may take after a write has failed. Both come together on a live connection."""


class EarlyStatus:
    """Keeps the status with which the server ended a call.

    A piece that is sent while the server refuses the upload can't be written. grpc.aio then replaces the server's
    status with INTERNAL, "Internal error from Core" (grpc/grpc#36066), or reports that one before the server's status
    has arrived. It calls the callbacks of the call for each of the two. This class can go when grpc.aio keeps the
    server's status (grpc/grpc#43486); ``test_an_upload_is_refused_before_its_end`` shows that.

    Args:
        call: a call of grpc.aio that has just begun.
    """

    def __init__(self, call: Any) -> None:
        self._status: grpc.aio.AioRpcError | None = None
        self._known = asyncio.Event()
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        # Nothing here waits: the call has a status, which is replaced when this method has returned.
        code, details = _result(call.code()), _result(call.details())
        if not _is_failed_write(code, details):
            self._status = grpc.aio.AioRpcError(code, None, _result(call.trailing_metadata()), details)
            self._known.set()

    async def of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the server's status, where ``error`` is a failed write in place of it; else ``error``."""
        if not _is_failed_write(error.code(), error.details()):
            return error
        try:
            await asyncio.wait_for(self._known.wait(), WAIT_SECONDS)
        except TimeoutError:
            return error
        return self._status or error


def _is_failed_write(code: grpc.StatusCode, details: str | None) -> bool:
    return code is grpc.StatusCode.INTERNAL and details == "Internal error from Core"


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that does not wait.

    Raises:
        RuntimeError: it waits.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("the coroutine waits")
