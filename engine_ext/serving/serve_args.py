"""The options of `starling serve`: all of `vllm serve`, and Starling's own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from attention_backends.kernels.choose import SETTINGS
from engine_ext.activation import CPU_ATTENTION, ENTRY, parse_config
from scheduler import scheduling_options
from scheduler.options import CHOICES, FIELDS, OptionError, flat_name, parse_options
from scheduler.scheduling_options import SECTION

GRPC_PORT_HELP = (
    "Serve gRPC (starling.v1.InferenceService, health, reflection) on this port too, on --host, or on "
    "127.0.0.1 where --host is not given. 0 takes a free port. Default: no gRPC."
)

ADMIN_KEY_ENV = "STARLING_ADMIN_KEY"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class AdminOptions:
    """Where AdminService is served: on ``port`` of ``host``, on the gRPC port for those who bear ``key``, or both."""

    port: int | None
    host: str
    key: str | None


NO_ADMIN = AdminOptions(None, LOOPBACK, None)


def flag(field: str) -> str:
    """``block_size`` -> ``--star-block-size``."""
    return "--" + flat_name(field).replace("_", "-")


def number(text: str) -> int | str:
    """The number that a flag's value says; other text as it is, for parse_options to refuse."""
    try:
        return int(text)
    except ValueError:
        return text


def make_parser() -> FlexibleArgumentParser:
    """vLLM's parser of `vllm serve`, with --star* added and --grpc-port given Starling's meaning."""
    top = FlexibleArgumentParser(prog="starling")
    parser = ServeSubcommand().subparser_init(top.add_subparsers(dest="subparser"))
    parser.usage = "starling serve [MODEL] [options]"
    parser.epilog = (parser.epilog or "").replace("vllm serve", "starling serve")
    group = parser.add_argument_group("Starling", "Star Attention (arXiv 2411.17116): defaults for every request.")
    for field, info in FIELDS.items():
        default = "" if info.default is None else f" (default: {info.default})"
        kind: dict[str, Any] = {"choices": CHOICES[field]} if field in CHOICES else {"type": number, "metavar": "N"}
        # Not in the namespace where not given: with None the formatter would add a wrong default to the help.
        group.add_argument(flag(field), default=argparse.SUPPRESS, help=f"{info.description}{default}", **kind)
    add_scheduling_flags(parser)
    for action in parser._actions:
        if action.dest == "grpc_port":
            action.help = GRPC_PORT_HELP
    group.add_argument(
        "--cpu-attention",
        choices=SETTINGS,
        default=argparse.SUPPRESS,
        help="On CPU: auto, Starling's attention op where it is faster than vLLM's, or vllm, vLLM's own always. "
        "Starling's is built at the first start, by a C++ compiler. (default: auto)",
    )
    group.add_argument(
        "--grpc-plaintext",
        action="store_true",
        help="Serve gRPC without TLS to other machines too: prompts, outputs and keys can be read on the way. "
        "Needed where --host (or --grpc-admin-host) is not loopback and --ssl-certfile is not given.",
    )
    add_admin_flags(group)
    return top


def add_scheduling_flags(parser: argparse.ArgumentParser) -> None:
    """The options of the `scheduler` section, as --scheduler-*."""
    group = parser.add_argument_group("Starling's scheduler", "Nobody waits behind a long prompt (docs/scheduler.md).")
    for field, info in scheduling_options.FIELDS.items():
        switch = field in scheduling_options.SWITCHES
        kind: dict[str, Any] = {"choices": ("on", "off")} if switch else {"type": number, "metavar": "N"}
        default = f" (default: {info.default})" if switch else ""
        name = "--" + scheduling_options.flat_name(field).replace("_", "-")
        group.add_argument(name, default=argparse.SUPPRESS, help=f"{info.description}{default}", **kind)


def scheduling_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Take the --scheduler-* flags that were given out of the parsed arguments, by their bare names."""
    names = {field: scheduling_options.flat_name(field) for field in scheduling_options.FIELDS}
    return {field: vars(args).pop(name) for field, name in names.items() if name in args}


def add_admin_flags(group: argparse._ArgumentGroup) -> None:
    """The options of gRPC's AdminService, which admin_options takes out of the parsed namespace."""
    group.add_argument(
        "--grpc-admin-port",
        type=int,
        help="Serve starling.v1.AdminService (cache state, abort, reset, drain) on this port too. 0 takes a free port.",
    )
    group.add_argument(
        "--grpc-admin-host",
        help=f"The host of --grpc-admin-port; other than loopback only with an admin key (default: {LOOPBACK})",
    )
    group.add_argument(
        "--grpc-admin-key",
        help="Let calls to AdminService in, on --grpc-port too, that bear this key (`authorization: Bearer KEY`). "
        f"{ADMIN_KEY_ENV} in the environment says it without showing it to other users.",
    )


def admin_options(args: argparse.Namespace, grpc_port: int | None, environ: Mapping[str, str]) -> AdminOptions:
    """Take the admin options out of the parsed arguments, which vLLM logs, the key among them.

    Raises:
        ValueError: options that have no effect, or would leave control of the server open to a network.
    """
    given = {name: vars(args).pop(f"grpc_admin_{name}", None) for name in ("port", "host", "key")}
    port, host = given["port"], given["host"] or LOOPBACK
    key = given["key"] or environ.get(ADMIN_KEY_ENV) or None
    for refused, reason in (
        (grpc_port is None and set(given.values()) != {None}, "without --grpc-port there is no gRPC to control"),
        (given["key"] == "", "the key is empty"),
        (port is not None and not 0 <= port <= 65535, "a port is 0 to 65535"),
        (port and port in (grpc_port, args.port), "another server of this process has that port"),
        (given["host"] is not None and port is None, "a host without --grpc-admin-port has no effect"),
        (
            port is not None and key is None and not is_loopback(host),
            f"whoever reaches {host} could control the server: give --grpc-admin-key or {ADMIN_KEY_ENV} too",
        ),
    ):
        if refused:
            shown = ", ".join(f"--grpc-admin-{name}={given[name]}" for name in ("port", "host") if given[name])
            raise ValueError(f"{shown or '--grpc-admin-key'} is refused: {reason}")
    return AdminOptions(port, host, key)


def refuse_open_plaintext(args: argparse.Namespace, grpc_port: int | None, admin: AdminOptions) -> None:
    """Take --grpc-plaintext out of the parsed arguments, and hold the hosts that gRPC listens on against it.

    Raises:
        ValueError: gRPC would be open to a network without TLS, and nobody said so; or the flag has no effect.
    """
    plaintext, tls = vars(args).pop("grpc_plaintext"), bool(args.ssl_certfile and args.ssl_keyfile)
    if plaintext and (grpc_port is None or tls):
        reason = "without --grpc-port there is no gRPC" if grpc_port is None else "--ssl-certfile asks for TLS"
        raise ValueError(f"--grpc-plaintext is refused: {reason}")
    if grpc_port is None or tls or plaintext:
        return
    for option, port, host in (
        ("--grpc-port", grpc_port, args.host or LOOPBACK),
        ("--grpc-admin-port", admin.port, admin.host),
    ):
        if port is not None and not is_loopback(host):
            raise ValueError(
                f"{option} {port} is refused: on {host}, which is not loopback, prompts, outputs and keys could be "
                "read on the way. Give --ssl-certfile and --ssl-keyfile; or --grpc-plaintext, if that is meant "
                "(behind a TLS proxy, for example)"
            )


def authority(host: str) -> str:
    """A host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, int | None]:
    """Parse a command line into vLLM's arguments, Starling activated in them, and the gRPC port.

    Raises:
        ValueError: options that can't be used, alone or together (OptionError is one).
        SystemExit: from argparse, after its own message or help.
    """
    args = make_parser().parse_args(["serve", *argv])
    flags = {field: vars(args).pop(flat_name(field)) for field in FIELDS if flat_name(field) in args}
    scheduling = scheduling_flags(args)
    args.additional_config = activate(args.additional_config, flags, vars(args).pop(CPU_ATTENTION, None), scheduling)
    refuse_bypasses(os.environ)
    # vLLM refuses a gRPC port anywhere but before its Rust front.
    grpc_port, args.grpc_port = args.grpc_port, None
    if grpc_port is not None:
        refuse_grpc_with(args, grpc_port)
        args.api_server_count = None  # one, also before several data-parallel engines
    elif args.data_parallel_size > 1 and args.api_server_count is None and not args.headless:
        args.api_server_count = 1  # vLLM's default is one a replica, on whose cores they would run
    return args, grpc_port


def activate(
    additional_config: Any,
    flags: Mapping[str, Any],
    cpu_attention: str | None = None,
    scheduling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``additional_config`` with its `starling` entry, into which the flags are merged: --star*, --cpu-attention and
    --scheduler-*.

    Raises:
        OptionError: a bad option, or one that a flag and --additional-config give different values.
    """
    if not isinstance(additional_config, Mapping):
        raise OptionError("additional_config", additional_config, "it must be an object", '{"starling": {...}}')
    entry = additional_config.get(ENTRY, {})
    merged = {**additional_config, ENTRY: entry}
    parse_config(merged)
    if cpu_attention is not None:
        refuse_two_values("--cpu-attention", cpu_attention, entry, CPU_ATTENTION)
        entry = {**entry, CPU_ATTENTION: cpu_attention}
        merged[ENTRY] = entry
        parse_config(merged)
    if scheduling:
        section = entry.get(SECTION, {})
        for field, value in scheduling.items():
            name = "--" + scheduling_options.flat_name(field).replace("_", "-")
            refuse_two_values(name, value, section, field)
        entry = {**entry, SECTION: {**section, **scheduling}}
        merged[ENTRY] = entry
        parse_config(merged)
    parse_options({flat_name(field): value for field, value in flags.items()}, flat=True)
    star = entry.get("star", {})
    for field, value in flags.items():
        refuse_two_values(flag(field), value, star, field)
    if flags:
        merged[ENTRY] = {**entry, "star": {**star, **flags}}
        parse_config(merged)
    return merged


def refuse_two_values(option: str, value: Any, section: Mapping[str, Any], field: str) -> None:
    """Refuse a flag beside another value in --additional-config (raises OptionError)."""
    if section.get(field, value) != value:
        reason = f"--additional-config says {field}={section[field]!r}"
        raise OptionError(option, value, reason, "one of the two, or the same")


def refuse_bypasses(environ: Mapping[str, str]) -> None:
    """Refuse settings under which requests or processes would miss Starling (raises ValueError)."""
    plugins = environ.get("VLLM_PLUGINS")
    if plugins is not None and ENTRY not in plugins.split(","):
        raise ValueError(f"VLLM_PLUGINS={plugins!r} keeps Starling out of vLLM's processes: add `{ENTRY}` or unset it")
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ValueError("VLLM_USE_RUST_FRONTEND is set: the Rust front reads no star options; unset it")


def refuse_grpc_with(args: argparse.Namespace, grpc_port: int) -> None:
    """Refuse what can't go with --grpc-port, by name (raises ValueError)."""
    for refused, reason in (
        (args.headless, "--headless starts no front"),
        (args.grpc, "--grpc serves vLLM's own gRPC, in place of HTTP"),
        (args.api_server_count not in (None, 1), "gRPC runs in one API server: --api-server-count must be 1"),
        (
            args.data_parallel_multi_port_external_lb,
            "--data-parallel-multi-port-external-lb starts several servers",
        ),
        (not 0 <= grpc_port <= 65535, "a port is 0 to 65535"),
        (grpc_port and grpc_port == args.port and not args.uds, "--port is the same"),
    ):
        if refused:
            raise ValueError(f"--grpc-port {grpc_port} is refused: {reason}")
