"""The socket of vLLM's server, and functions whose module is another one in vLLM 0.33 than in 0.32."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any

from starling.vllm_compat.patching import Original, first_found, touches, wrap

default_chat_template_kwargs = first_found(
    "vllm.entrypoints.common.cli_args:resolve_default_chat_template_kwargs",
    "vllm.entrypoints.launchers.cli_args:resolve_default_chat_template_kwargs",
)
"""From the server's arguments: the keyword arguments that every chat template gets."""

validate_serve_args = first_found(
    "vllm.entrypoints.common.cli_args:validate_parsed_serve_args",
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args",
)
"""Raises TypeError or ValueError for arguments of `vllm serve` that exclude one another."""

set_up_environment = first_found(
    "vllm.entrypoints.common.startup:cli_env_setup",
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup",
)
"""Sets the environment variables that every `vllm` command sets at its start."""


def on_server_socket(callback: Callable[[socket.socket], None]) -> None:
    """Call ``callback(listener)`` with the TCP socket of vLLM's HTTP server, before it listens.

    Goes when vLLM has options for TCP's keepalive.
    """
    from vllm.entrypoints.launchers import launcher

    @wrap(launcher, "create_server_socket")
    def create_server_socket(original: Original, *args: Any, **kwargs: Any) -> socket.socket:
        listener: socket.socket = original(*args, **kwargs)
        callback(listener)
        return listener


@touches("vllm.entrypoints.launchers.launcher.serve_http")
def close_connections(state: Any) -> None:
    """Close all connections of vLLM's HTTP server, and end their tasks: its shutdown then waits for no client.

    vLLM sets uvicorn's ``timeout_graceful_shutdown`` neither by an option nor by a default, and keeps the server in the
    application's state. Goes when it has an option.

    Args:
        state: state of the application.
    """
    server = state.server
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    for task in list(server.server_state.tasks):
        task.cancel()


@functools.cache
def bound_request_heads(limit: int) -> None:
    """Let vLLM's HTTP server refuse requests whose line and headers, or trailers, have more than ``limit`` bytes: 400.

    uvicorn has a limit with h11 alone, and vLLM's options of it have no effect with httptools, which uvicorn uses where
    it is installed. Goes when uvicorn has one for both.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:  # without httptools
        return

    def begin_anew(original: Original) -> Original:
        def callback(self: Any, *args: Any) -> Any:
            self.starling_head = 0
            return original(self, *args)

        return callback

    def count(original: Original) -> Original:
        def data_received(self: Any, data: bytes) -> None:
            self.starling_head = getattr(self, "starling_head", 0) + len(data)
            original(self, data)
            if self.starling_head > limit and not self.transport.is_closing():
                self.send_400_response(f"The head of a request may have {limit} bytes at most.")

        return data_received

    for name in ("on_headers_complete", "on_body", "on_message_complete"):
        setattr(HttpToolsProtocol, name, begin_anew(getattr(HttpToolsProtocol, name)))
    setattr(HttpToolsProtocol, "data_received", count(HttpToolsProtocol.data_received))  # noqa: B010
