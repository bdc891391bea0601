"""Options of `starling serve`: all of `vllm serve`, and Starling's own."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from starling.config.entry import (
    ADMIN_KEY_ENV,
    CACHE_SALT,
    CHOICES,
    ENTRY,
    LIVE_PAGE,
    PRESET,
    PRESETS,
    SCHEDULING,
    STAR_ADAPTER,
    STAR_HEADS,
    STAR_LIBRARY,
    parse_config,
    refuse_missing_plugin,
    refuse_rust_front,
)
from starling.config.library import FORM
from starling.config.parsing import OptionError, meant
from starling.config.scheduling import SchedulingOptions
from starling.config.star import QUALITY_SIZES, SHARED, StarOptions, flat_name, parse_options
from starling.engine_ext.serving.grpc.server_options import LOOPBACK, AdminOptions, is_loopback
from starling.vllm_compat.config import move_option

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

GRPC_PORT_HELP = (  # with its default in no characters: else the formatter would add it
    "Serve gRPC (starling.v1.InferenceService, health, reflection) on this port too, on --host, or on "
    "127.0.0.1 where --host is not given. 0: any free port. Default: no gRPC.%(default).0s"
)
QUALITY_SIZES_HELP = (
    "What the words of --star-quality stand for: fast=n/16,balanced=n/8,careful=dense, say, star blocks of a share of "
    "the prompt, or dense. `starling advise` measures it on your model and prompts. (default: as --star-quality says)"
)
STAR_HEADS_HELP = (
    "The scores of the model's KV heads, for --star-dense-heads: a file that `starling calibrate` made of it, or "
    "one of DuoAttention's. (default: those that come with Starling, where the model is one of theirs; on a GPU, "
    "--star-dense-heads has to ask for them)"
)
STAR_ADAPTER_HELP = (
    "A LoRA adapter that `starling distil` made of the model: prompts with documents, or with star blocks, as it was "
    "trained for, run with it and lose less; all others run with the model alone. (default: none)"
)
STAR_LIBRARY_HELP = (
    "Keep the KV pages of prompts in host memory, MEMORY of it for each engine (4GiB if not given), and in files in "
    "the folder DIR, FILES in all (as much as MEMORY if not given). What was not used for longest makes room. "
    "Documents and other star blocks are found there wherever they stand in a prompt, after a restart too. (default: "
    "none; vLLM's --kv-transfer-config can say more)"
)
CACHE_SALT_HELP = (
    "Which requests share cached KV pages: request, those with the same cache_salt, or without one, as in vLLM; "
    "required, as request, but requests without a cache_salt are refused; api-key, those with the same API key and the "
    "same cache_salt or none (needs --api-key). (default: request)"
)


LIVE_PAGE_HELP = (
    "on: the HTTP server has a page, /starling/live, that shows the requests while they run. It needs the server's API "
    f"key or, where the server has one, the admin key ({ADMIN_KEY_ENV}, --grpc-admin-key). (default: off)"
)


@dataclass(frozen=True)
class Flag:
    """A flag that sets a value of the `starling` entry of additional_config.

    Attributes:
        dest: the flag's name in the parsed namespace: ``star_block_size``.
        path: path of the value in the entry: ``("star_block_size",)``, ``("scheduler", "fairness")``.
        keywords: keyword arguments of argparse's add_argument.
    """

    dest: str
    path: tuple[str, ...]
    keywords: dict[str, Any]

    @property
    def option(self) -> str:
        """Name on the command line, such as ``--star-block-size``."""
        return "--" + self.dest.replace("_", "-")

    def merge(self, entry: Mapping[str, Any], value: Any) -> dict[str, Any]:
        """Return the entry with the flag's value.

        Raises:
            OptionError: the entry has another value.
        """
        *section, name = self.path
        owner = entry.get(section[0], {}) if section else entry
        if name not in owner:
            return {**entry, **self.alone(value, owner)}
        if parse_config({ENTRY: self.alone(value)}) != parse_config({ENTRY: self.alone(owner[name])}):
            reason = f"--additional-config says {name}={owner[name]!r}"
            raise OptionError(self.option, value, reason, "one of the two, or the same")
        return dict(entry)

    def alone(self, value: Any, owner: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Return an entry with the flag's value and, in the same section, the other values of ``owner``."""
        *section, name = self.path
        changed = {**owner, name: value}
        return {section[0]: changed} if section else changed


METAVARS = {
    "mode": "{off,on,auto}",
    "quality": "{fast,balanced,careful}",
    "block_size": "N|n/8",
    "dense_heads": "SHARE",
    "segments": "auto|TEXT",
    "replicas": "auto|N",
    "shards": "{off,on}",
}


def star_flags() -> Iterator[Flag]:
    """Yield a flag for each star option; the options' own checks refuse wrong values."""
    for field, info in StarOptions.model_fields.items():
        if flat_name(field) not in SHARED:
            continue
        default = "" if info.default is None else f" (default: {info.default})"
        name = flat_name(field)
        yield Flag(name, (name,), {"metavar": METAVARS.get(field, "N"), "help": f"{info.description}{default}"})


def choice(name: str, help_text: str, *section: str) -> Flag:
    """Return a flag that takes one of a few words."""
    choices = ("on", "off") if section else CHOICES[name]
    return Flag("_".join((*section, name)), (*section, name), {"choices": choices, "help": help_text})


PRESET_HELP = (
    "Options for a kind of work, of which single options replace theirs: "
    + "; ".join(f"{name}, {preset.meaning}" for name, preset in PRESETS.items())
    + ". (default: none)"
)
GROUPS = ("Starling", "Starling advanced")
EVERYDAY = {PRESET, STAR_LIBRARY, LIVE_PAGE, *map(flat_name, ("mode", "quality", "min_tokens", "segments"))}
"""Names of the flags that most users need; the others are advanced."""

FLAGS = (
    Flag(PRESET, (PRESET,), {"metavar": f"{{{','.join(PRESETS)}}}", "help": PRESET_HELP}),
    *star_flags(),
    Flag(QUALITY_SIZES, (QUALITY_SIZES,), {"metavar": "WORD=SIZE,...", "help": QUALITY_SIZES_HELP}),
    Flag(STAR_HEADS, (STAR_HEADS,), {"metavar": "FILE", "help": STAR_HEADS_HELP}),
    Flag(STAR_ADAPTER, (STAR_ADAPTER,), {"metavar": "DIR", "help": STAR_ADAPTER_HELP}),
    Flag(STAR_LIBRARY, (STAR_LIBRARY,), {"metavar": FORM, "help": STAR_LIBRARY_HELP}),
    choice(CACHE_SALT, CACHE_SALT_HELP),
    choice(LIVE_PAGE, LIVE_PAGE_HELP),
    choice("fairness", f"{SchedulingOptions.model_fields['fairness'].description} (default: on)", SCHEDULING),
)


ADMIN_OPTIONS = ("grpc-admin-port", "grpc-admin-host", "grpc-admin-key")
OWN_OPTIONS = (*(flag.option[2:] for flag in FLAGS), "grpc-port", "grpc-plaintext", *ADMIN_OPTIONS)
"""Starling's options of `starling serve`, without leading dashes."""

CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
UNKNOWN = re.compile(r"unrecognized arguments: .*?(--[^ =]+).*", re.DOTALL)


def with_nearest(message: str) -> str:
    """Return a message of argparse, with the allowed word or Starling option that a wrong one resembles.

    Only the first unknown option is named, without its value, which may be a secret.
    """
    if found := CHOICE.search(message):
        return message + meant(found[1], [word.strip("'") for word in found[2].split(", ")])
    if found := UNKNOWN.search(message):
        near = meant(found[1][2:], OWN_OPTIONS)
        return f"unrecognized arguments: {found[1]}{near.replace('did you mean ', 'did you mean --')}"
    return message


def make_parser() -> FlexibleArgumentParser:
    """Make vLLM's parser of `vllm serve`, with Starling's options and its meaning of --grpc-port."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(with_nearest(message))

    top = Parser(prog="starling")
    parser = ServeSubcommand().subparser_init(top.add_subparsers(dest="subparser"))
    parser.usage = "starling serve [MODEL] [options]"
    parser.epilog = (parser.epilog or "").replace("vllm serve", "starling serve")
    starling = parser.add_argument_group(
        GROUPS[0],
        "Star Attention (arXiv 2411.17116), as the default for every request, and gRPC (--grpc-port). More of both: "
        "--help='starling advanced'.",
    )
    advanced = parser.add_argument_group(
        GROUPS[1], "Sizes of star blocks; several replicas; what clients share; and control over gRPC."
    )
    move_option(parser, "grpc_port", starling, GRPC_PORT_HELP)
    for flag in FLAGS:
        group = starling if flag.dest in EVERYDAY else advanced
        # Not in the namespace where not given: with None the formatter would add a wrong default to the help.
        group.add_argument(flag.option, default=argparse.SUPPRESS, **flag.keywords)
    advanced.add_argument(
        "--grpc-plaintext",
        action="store_true",
        help="Serve gRPC to other machines without TLS: others can read prompts, outputs and keys on the network. "
        "Required where --host (or --grpc-admin-host) is not loopback and --ssl-certfile is not given.",
    )
    advanced.add_argument(
        "--grpc-admin-port",
        default=argparse.SUPPRESS,
        type=int,
        help="Serve starling.v1.AdminService (cache state, abort, reset, drain) on this port too. 0: any free port. "
        "Default: no such port.",
    )
    advanced.add_argument(
        "--grpc-admin-host",
        default=argparse.SUPPRESS,
        help=f"The host of --grpc-admin-port; a host other than loopback requires an admin key (default: {LOOPBACK})",
    )
    advanced.add_argument(
        "--grpc-admin-key",
        default=argparse.SUPPRESS,
        help="Allow calls of AdminService that have this key (`authorization: Bearer KEY`), on --grpc-port too. Other "
        f"users can see the command line; they can't see {ADMIN_KEY_ENV} of the environment, which does the same.",
    )
    return top


def admin_options(args: argparse.Namespace, grpc_port: int | None, environ: Mapping[str, str]) -> AdminOptions:
    """Remove the admin options from the parsed arguments and return them; vLLM would log them, including the key.

    Raises:
        ValueError: options have no effect, or would let anyone on a network control the server.
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
            f"anyone who can connect to {host} could control the server: give --grpc-admin-key or {ADMIN_KEY_ENV} too",
        ),
    ):
        if refused:
            shown = ", ".join(f"--grpc-admin-{name}={given[name]}" for name in ("port", "host") if given[name])
            raise ValueError(f"{shown or '--grpc-admin-key'} is refused: {reason}")
    return AdminOptions(port, host, key)


def refuse_open_plaintext(args: argparse.Namespace, grpc_port: int | None, admin: AdminOptions) -> None:
    """Remove --grpc-plaintext from the parsed arguments, and check the hosts of gRPC's ports against it.

    Raises:
        ValueError: other machines could use gRPC without TLS, and the flag is not given; or the flag has no effect.
    """
    plaintext, tls = vars(args).pop("grpc_plaintext"), bool(args.ssl_certfile and args.ssl_keyfile)
    if plaintext and (grpc_port is None or tls):
        reason = "without --grpc-port there is no gRPC" if grpc_port is None else "--ssl-certfile enables TLS"
        raise ValueError(f"--grpc-plaintext is refused: {reason}")
    if grpc_port is None or tls or plaintext:
        return
    for option, port, host in (
        ("--grpc-port", grpc_port, args.host or LOOPBACK),
        ("--grpc-admin-port", admin.port, admin.host),
    ):
        if port is not None and not is_loopback(host):
            raise ValueError(
                f"{option} {port} is refused: {host} is not loopback, so others could read prompts, outputs and keys "
                "on the network. Give --ssl-certfile and --ssl-keyfile; or --grpc-plaintext, for example behind a TLS "
                "proxy"
            )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, int | None]:
    """Parse a command line into vLLM's arguments, with Starling activated in them, and the gRPC port.

    Raises:
        ValueError: options can't be used, alone or together (OptionError is one).
        SystemExit: from argparse, after its own message or help.
    """
    args = make_parser().parse_args(["serve", *argv])
    values = {flag.dest: vars(args).pop(flag.dest) for flag in FLAGS if flag.dest in args}
    args.additional_config = activate(args.additional_config, values)
    refuse_missing_plugin(os.environ)
    refuse_rust_front(os.environ)
    # vLLM refuses a gRPC port except with its Rust front.
    grpc_port, args.grpc_port = args.grpc_port, None
    if grpc_port is not None:
        refuse_grpc_with(args, grpc_port)
        args.api_server_count = None  # one, also with several data-parallel engines
    elif args.data_parallel_size > 1 and args.api_server_count is None and not args.headless:
        args.api_server_count = 1  # vLLM's default is one for each replica, and they would run on the replicas' cores
    return args, grpc_port


def activate(additional_config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``additional_config`` with its `starling` entry, into which the flags' values are merged.

    Args:
        additional_config: value of vLLM's --additional-config.
        values: values of the given flags of FLAGS, by ``dest``.

    Raises:
        OptionError: an option is bad, or a flag and --additional-config give it different values.
    """
    if not isinstance(additional_config, Mapping):
        raise OptionError("additional_config", additional_config, "it must be an object", '{"starling": {...}}')
    entry = additional_config.get(ENTRY, {})
    parse_config({ENTRY: entry})
    star = parse_options({name: value for name, value in values.items() if name in SHARED})
    for flag in FLAGS:
        if flag.dest in values:
            field = SHARED.get(flag.dest)
            entry = flag.merge(entry, values[flag.dest] if field is None else getattr(star, field))
    merged = {**additional_config, ENTRY: entry}
    parse_config(merged)
    return merged


def refuse_grpc_with(args: argparse.Namespace, grpc_port: int) -> None:
    """Refuse options that exclude --grpc-port, and unusable ports (raises ValueError)."""
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
