"""`starling serve`: vLLM's OpenAI server with Starling activated, and the gRPC server on the same engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import MutableMapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import psutil
import uvloop
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.logger import configure_logging_from_args, init_logger
from vllm.platforms import current_platform
from vllm.utils.system_utils import decorate_logs

from starling.config.entry import ADMIN_KEY_ENV, ENTRY
from starling.engine_ext.front.bounds import MAX_CHOICES, MAX_CHOICES_ENV
from starling.engine_ext.front.cache_salt import api_keys
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.planning import PromptPlanner
from starling.engine_ext.serving.cli.cpu_host import (
    CORES_ENV,
    bound_cores,
    core_binding,
    free_cores,
    memory_share,
    physical_cores,
)
from starling.engine_ext.serving.cli.serve_args import admin_options, parse, refuse_open_plaintext
from starling.engine_ext.serving.grpc.server_options import GRACE_SECONDS, LOOPBACK, AdminOptions, join_address
from starling.vllm_compat.config import is_of_configuration, plain_message
from starling.vllm_compat.core_process import engine_reports
from starling.vllm_compat.front import around_shutdown, is_hooked, num_engine_cores
from starling.vllm_compat.server_socket import on_server_socket, set_up_environment, validate_serve_args

if TYPE_CHECKING:
    from starling.engine_ext.serving.grpc.server import Front

logger = init_logger("vllm.starling")

ENGINE_DEAD = 1
UNUSABLE = 2
INTERRUPTED = 130
START_GRACE_SECONDS = 3.0


def run(argv: Sequence[str]) -> int:
    """Serve until a signal and return the exit code.

    Returns:
        0 after a signal, 1 if the engine died, 2 for unusable arguments, 130 for a signal at the start.
    """
    set_defaults(os.environ)
    set_up_environment()
    on_server_socket(end_lost_connections)
    try:
        install_hooks()
        args, grpc_port = parse(argv)
        admin = admin_options(args, grpc_port, os.environ)  # before vLLM logs its arguments, which have the key
        if admin.key is not None:
            os.environ[ADMIN_KEY_ENV] = admin.key  # the live page needs it too
        refuse_open_plaintext(args, grpc_port, admin)
        configure_logging_from_args(args)
        validate_serve_args(args)
        bind_cores(args)
        fit_memory(args)
        if not (args.headless or args.grpc or args.uds or args.data_parallel_multi_port_external_lb):
            refuse_taken_port("--port", args.host or "", args.port)
        if grpc_port is not None:
            from starling.engine_ext.serving.grpc.auth import server_credentials  # imports grpc

            server_credentials(args)
            refuse_taken_port("--grpc-port", args.host or LOOPBACK, grpc_port)
            if admin.port is not None:
                refuse_taken_port("--grpc-admin-port", admin.host, admin.port)
    except NotHooked as error:
        return without_hooks(error)
    except (ValueError, TypeError, OSError) as error:
        print(f"starling serve: error: {error}", file=sys.stderr)
        return UNUSABLE
    try:
        if grpc_port is None and not is_one_front(args):
            ServeSubcommand.cmd(args)
        else:
            args.model, args.api_server_count = args.model_tag or args.model, None
            return uvloop.run(serve_both(args, grpc_port, admin))
    except NotHooked as error:
        return without_hooks(error)
    except KeyboardInterrupt:  # a signal while the engine starts; a later signal lets serve_both return
        return INTERRUPTED
    except (ValueError, OSError) as error:  # found with the model's configuration, such as features that exclude star
        if not is_of_configuration(error):
            raise
        print(f"starling serve: error: {plain_message(error)}", file=sys.stderr)
        return UNUSABLE
    return 0


def without_hooks(error: NotHooked) -> int:
    """Print why the server would run without Starling, and return the exit code."""
    print(f"starling serve: error: Starling is not in this vLLM: {error}", file=sys.stderr)
    return UNUSABLE


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set environment variables of vLLM to Starling's own defaults, unless the user has set them."""
    # By default vLLM reports usage to its project's server. A Starling server does so only where the user wants it.
    environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    environ.setdefault(MAX_CHOICES_ENV, str(MAX_CHOICES))
    environ.setdefault(KEEP_ALIVE_ENV, str(KEEP_ALIVE_SECONDS))


def refuse_taken_port(option: str, host: str, port: int) -> None:
    """Check that a port is free.

    Args:
        option: the option that sets the port, for the message.
        host: host of the port; empty for all addresses of this machine.
        port: the port.

    Raises:
        OSError: the port can't be used.
    """
    try:
        family = socket.getaddrinfo(host or "0.0.0.0", port)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else getattr(error, "strerror", error)
        allowed = "a free port, or 0 for any" if option != "--port" else "a free port"
        refusal = f"it can't be used on {host or 'this machine'}: {reason}"
        raise OSError(f"{option}={port} is refused: {refusal}. Allowed: {allowed}.") from None


def fit_memory(args: Namespace) -> None:
    """Lower the memory share of an engine on a CPU if vLLM's share is not free, or is nearly all that is free."""
    share = memory_share(args, os.environ)
    if share is not None:
        args.gpu_memory_utilization = share
        reason = "vLLM's default would leave this host too little memory for other processes"
        logger.info("--gpu-memory-utilization %g: %s", share, reason)


def is_one_front(args: Namespace) -> bool:
    """Return whether the server is one API server, in this process, of one replica or several.

    If it is, Starling logs the addresses it listens on, and handles a signal during the start.
    """
    external = args.data_parallel_external_lb or args.data_parallel_rank is not None
    several = external or args.data_parallel_multi_port_external_lb or args.data_parallel_start_rank is not None
    one = args.api_server_count == 1 or (args.api_server_count is None and args.data_parallel_size == 1)
    return one and not (several or args.headless or args.grpc)


def bind_cores(args: Namespace) -> None:
    """Give each replica and server of this host its own cores, unless the environment already sets them."""
    if CORES_ENV in os.environ or not current_platform.is_cpu():
        return
    bound = bound_cores()
    binding = core_binding(args, os.environ, bound)
    if binding is not None:
        os.environ[CORES_ENV] = binding
        others = f"; other engines of this host have bound {sorted(bound)}" if bound else ""
        logger.info("%s=%s: each replica has its own cores%s", CORES_ENV, binding, others)
    cores = physical_cores() if binding is None else [int(core) for core in re.findall(r"\d+", binding)]
    if len(free_cores(cores, bound)) < len(cores):
        logger.warning(
            "Other engines of this host have bound the cores %s, and too few are left: one engine may wait for another "
            "for minutes. Set %s for each server, to cores of its own",
            sorted(bound),
            CORES_ENV,
        )


async def serve_both(args: Namespace, grpc_port: int | None, admin: AdminOptions) -> int:
    """Run vLLM's OpenAI server, and the gRPC server if it has a port, and return the exit code.

    The gRPC server starts before the HTTP server, and stops before the engine.
    """
    decorate_logs("APIServer", skip_if_decorated=True)
    signal.signal(signal.SIGTERM, interrupt_start)
    listen_address, sock = setup_server(args, reuse_port=False)
    with sock:
        async with build_async_engine_client(args) as engine:
            check_hooks(engine)
            front, grpc_address = None, None
            if grpc_port is not None:
                front, grpc_address = await start_front(engine, args, grpc_port, admin)
            logger.info("Starling: %s", kv_room(front_state(engine).planner))
            logger.info("Starling: %s", addresses(listen_address, grpc_address, args))
            grace = max(GRACE_SECONDS, args.shutdown_timeout)
            if front is not None:
                if (replicas := front_state(engine).replicas) is not None:
                    replicas.state.let_split_requests_end(engine)  # after the front has stopped: health says so first
                stop_before_engine(engine, front)
            try:
                http_shutdown = await build_and_serve(engine, listen_address, sock, args)
            finally:
                if front is not None:
                    await front.stop(grace)
        await http_shutdown
        # Where the engine dies, vLLM's watchdog ends the HTTP server as a signal does.
        return ENGINE_DEAD if front is not None and front.engine_died else 0


def interrupt_start(*_: Any) -> None:
    """Handle SIGTERM before the HTTP server has its own handlers.

    vLLM waits until a starting engine can be stopped, and in some places does not notice that the engine is dead. A
    starting server has no state to save: after START_GRACE_SECONDS a timer ends all of its processes.

    Raises:
        KeyboardInterrupt: always, to end the start.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    timer = threading.Timer(START_GRACE_SECONDS, kill_processes)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt("terminated")


def kill_processes() -> None:
    """Kill this process and its children, except the resource tracker, which then removes shared memory."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
    os._exit(INTERRUPTED)


def kv_room(planner: PromptPlanner) -> str:
    """Return the size of a KV page, and the tokens that all replicas have room for, as text for the log."""
    page_size = planner.page_size
    if page_size is None:
        return "KV pages of several sizes"
    num_tokens = page_size * planner.num_pages * planner.vllm_config.parallel_config.data_parallel_size
    return f"KV pages of {page_size} tokens, room for {num_tokens:,} tokens"


def addresses(http: str, grpc: str | None, args: Namespace) -> str:
    """Return the addresses of the server as text for the log.

    Args:
        http: the address as vLLM shows it.
        grpc: host:port, or None without gRPC.
        args: parsed arguments of the server.
    """
    if grpc is None:
        return f"HTTP on {http}, no gRPC (--grpc-port)"
    only = ", for this machine only: --host serves others" if args.host is None else ""
    return f"HTTP on {http}, gRPC on {grpc} ({'TLS' if args.ssl_certfile else 'plaintext'}{only})"


async def start_front(engine: Any, args: Namespace, port: int, admin: AdminOptions) -> tuple[Front, str]:
    """Start the gRPC server on ``port`` (0: any free port), and return it and its address.

    Raises:
        ValueError, OSError: the TLS options can't be used, see ``server_credentials``.
        RuntimeError: the server can't listen there.
    """
    from starling.engine_ext.serving.grpc.auth import server_credentials
    from starling.engine_ext.serving.grpc.prompt_inputs import chat_params
    from starling.engine_ext.serving.grpc.server import Front

    host = args.host or LOOPBACK
    credentials = server_credentials(args)
    show_cached = args.enable_prompt_tokens_details
    front = Front(engine, api_keys(args), chat_params(args), admin, show_cached)
    return front, join_address(host, await front.start(join_address(host, port), credentials))


def stop_before_engine(engine: Any, front: Front) -> None:
    """Let gRPC streams end before the engine does: they get the engine's shutdown time, and at least GRACE_SECONDS.

    On a signal, vLLM's serve_http stops the engine in a thread, where it is safe to wait for the event loop. On the
    event loop's own thread this does nothing: ``serve_both`` stops the front there.
    """
    loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()

    def stop_front(timeout: float | None) -> None:
        grace = max(GRACE_SECONDS, timeout or 0)
        if threading.get_ident() != loop_thread:
            stopping = asyncio.run_coroutine_threadsafe(front.stop(grace), loop)
            with contextlib.suppress(TimeoutError):  # the loop is busy with requests that the engine is to end
                stopping.result(grace + GRACE_SECONDS)

    around_shutdown(engine, stop_front)


GROUP, PLUGIN = "vllm.general_plugins", "starling.engine_ext.start.plugin"


class NotHooked(RuntimeError):
    """Error of a server that would run without Starling: without salts, page keys and star."""


def install_hooks() -> None:
    """Install the hooks in this process, and check that vLLM's other processes can do the same (raises NotHooked)."""
    if ENTRY not in {plugin.name for plugin in entry_points(group=GROUP)}:
        raise NotHooked(f"no installed package has the entry point `{ENTRY}` of {GROUP}: install vllm-starling again")
    try:
        importlib.import_module(PLUGIN).register()
    except Exception as error:
        raise NotHooked(f"the plugin does not load: {type(error).__name__}: {error}") from error


def check_hooks(engine: Any) -> None:
    """Check that the front of a started AsyncLLM has Starling's hooks, and that each engine core has its scheduler.

    Raises:
        NotHooked: one of them does not.
    """
    if not is_hooked():
        raise NotHooked("this process runs vLLM's own front")
    cores, reports = num_engine_cores(engine), len(engine_reports(engine.vllm_config))
    if reports < cores:
        raise NotHooked(f"{cores - reports} of {cores} engine cores run vLLM's own scheduler")


KEEP_ALIVE_ENV, KEEP_ALIVE_SECONDS = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", 75
"""Environment variable of vLLM for the seconds that a connection without a request stays open, and its default here.

With vLLM's default of 5 s, requests are lost. Clients and gateways keep connections for 5 to 60 s, and send a request
on one that the server closes at that moment. And after a moment in which the front did not run, its event loop closes
connections whose time is over before it reads the requests that have arrived on them.
"""

IDLE_SECONDS, INTERVAL_SECONDS, PROBES = 20, 10, 2


def end_lost_connections(listener: socket.socket) -> None:
    """Let connections that a socket accepts, and their requests, end 40 s after the client has vanished.

    uvicorn has no option for it. Nothing is sent during a prefill, so the kernel sends probes. Data that is being sent
    must be acknowledged in that time.
    """
    seconds = IDLE_SECONDS + INTERVAL_SECONDS * PROBES
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000),
    ):
        listener.setsockopt(level, option, value)
