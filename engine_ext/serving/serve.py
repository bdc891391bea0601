"""`starling serve`: vLLM's OpenAI server with Starling activated, and gRPC beside it on the same engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import psutil
import uvloop
from vllm import envs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args, init_logger
from vllm.utils.system_utils import decorate_logs

from engine_ext import compat
from engine_ext.serving.cores import CORES_ENV, core_binding
from engine_ext.serving.grpc_front import GRACE_SECONDS, Front
from engine_ext.serving.grpc_gate import server_credentials
from engine_ext.serving.grpc_prompts import chat_params
from engine_ext.serving.serve_args import (
    LOOPBACK,
    AdminOptions,
    admin_options,
    authority,
    parse,
    refuse_open_plaintext,
)
from scheduler.options import OptionError

logger = init_logger("vllm.starling")

ENGINE_DEAD = 1
UNUSABLE = 2
INTERRUPTED = 130
START_GRACE_SECONDS = 3.0


def run(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code.

    0 after a signal, 1 where the engine died, 2 for unusable arguments, 130 for a signal at the start.
    """
    # vLLM reports usage to a server of its project unless told not to; ours calls out only where asked to.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    cli_env_setup()
    try:
        args, grpc_port = parse(argv)
        admin = admin_options(args, grpc_port, os.environ)  # before vLLM logs its arguments, the key among them
        refuse_open_plaintext(args, grpc_port, admin)
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        bind_cores(args)
        if grpc_port is not None:
            server_credentials(args)
            refuse_taken_port("--grpc-port", args.host or LOOPBACK, grpc_port)
            if admin.port is not None:
                refuse_taken_port("--grpc-admin-port", admin.host, admin.port)
    except (ValueError, TypeError, OSError) as error:
        print(f"starling serve: error: {error}", file=sys.stderr)
        return UNUSABLE
    try:
        if grpc_port is None and not before_replicas(args):
            ServeSubcommand.cmd(args)
        else:
            args.model, args.api_server_count = args.model_tag or args.model, None
            return uvloop.run(serve_both(args, grpc_port, admin))
    except KeyboardInterrupt:  # a signal while the engine starts; later ones end serve_both in order
        return INTERRUPTED
    except OptionError as error:  # what only the model's configuration tells: the page, what star does not run with
        print(f"starling serve: error: {error}", file=sys.stderr)
        return UNUSABLE
    return 0


def before_replicas(args: Namespace) -> bool:
    """Whether one API server stands before several replicas: then a signal at the start is ours to see to as well."""
    external = args.data_parallel_external_lb or args.data_parallel_rank is not None
    return args.data_parallel_size > 1 and args.api_server_count == 1 and not (args.headless or args.grpc or external)


def bind_cores(args: Namespace) -> None:
    """Give each replica on this host cores of its own, where nobody said otherwise."""
    binding = core_binding(args, os.environ)
    if binding is not None:
        os.environ[CORES_ENV] = binding
        logger.info("%s=%s: each replica has cores of its own", CORES_ENV, binding)


def refuse_taken_port(option: str, host: str, port: int) -> None:
    """Fail now and not after the model has been loaded (raises OSError)."""
    family = socket.getaddrinfo(host, port)[0][0]
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(f"{option} {port} can't be had on {host}: {error.strerror}") from None


async def serve_both(args: Namespace, grpc_port: int | None, admin: AdminOptions) -> int:
    """vLLM's run_server, and gRPC where asked for: started before HTTP, stopped before the engine."""
    decorate_logs("APIServer", skip_if_decorated=True)
    signal.signal(signal.SIGTERM, interrupt_start)
    listen_address, sock = setup_server(args, reuse_port=False)
    with sock:
        async with build_async_engine_client(args) as engine:
            front = None if grpc_port is None else await start_front(engine, args, grpc_port, admin)
            grace = max(GRACE_SECONDS, args.shutdown_timeout)
            if front is not None:
                stop_before_engine(engine, front, grace)
            try:
                http_shutdown = await build_and_serve(engine, listen_address, sock, args)
            finally:
                if front is not None:
                    await front.stop(grace)
        await http_shutdown
        # vLLM's watchdog ends the HTTP server of a dead engine as a signal does.
        return ENGINE_DEAD if front is not None and front.engine_died else 0


def interrupt_start(*_: Any) -> None:
    """SIGTERM before the HTTP server has handlers of its own.

    vLLM waits for an engine that starts before it stops it, in some places without looking whether it still lives.
    There is nothing to save yet: what has not ended in time is ended here, engine processes and all.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watchdog = threading.Timer(START_GRACE_SECONDS, end_now)
    watchdog.daemon = True
    watchdog.start()
    raise KeyboardInterrupt("terminated")


def end_now() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):  # ends after us, and removes shared memory
                child.kill()
    os._exit(INTERRUPTED)


async def start_front(engine: Any, args: Namespace, port: int, admin: AdminOptions) -> Front:
    host = args.host or LOOPBACK
    credentials = server_credentials(args)
    compat.note_lora_adapters()
    front = Front(engine, [key for key in args.api_key or [envs.VLLM_API_KEY] if key], chat_params(args), admin)
    address = authority(host)
    port = await front.start(f"{address}:{port}", credentials)
    logger.info("gRPC server on %s:%d (%s)", address, port, "plaintext" if credentials is None else "TLS")
    if args.host is None:
        logger.info("gRPC listens on loopback alone: give --host to serve other machines")
    return front


def stop_before_engine(engine: Any, front: Front, grace: float) -> None:
    """Let gRPC streams end before the engine does: on a signal vLLM's serve_http stops the engine first.

    It does so in a thread, where waiting for the event loop is safe. Can go when serve_http takes a hook.
    """
    loop, loop_thread, stop_engine = asyncio.get_running_loop(), threading.get_ident(), engine.shutdown

    def shutdown(timeout: float | None = None) -> None:
        if threading.get_ident() != loop_thread:
            asyncio.run_coroutine_threadsafe(front.stop(grace), loop).result()
        stop_engine(timeout=timeout)

    engine.shutdown = shutdown
