"""What `starling serve` refuses before it imports vLLM, which takes most of the time to a message.

All of it is checked again behind the import, by vLLM or by serve.py, with what a file of `--config` says too.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from starling.config.entry import ENTRY, STAR_LIBRARY, parse_config
from starling.config.library import check_place
from starling.config.parsing import OptionError, meant
from starling.engine_ext.serving.cli.serve_args import FLAGS, OWN_OPTIONS, activate
from starling.engine_ext.serving.grpc.addresses import LOOPBACK
from starling.vllm_compat.options import serve_options, stem

HTTP_PORT = "8000"  # vLLM's default
PORT, GRPC_PORT, ADMIN_PORT = "port", "grpc-port", "grpc-admin-port"
NO_HTTP = ("headless", "grpc", "uds", "data-parallel-multi-port-external-lb")
"""With these options the process has no HTTP server, or not on --port of TCP."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CONFIG_FILES = ("config.json", "params.json")
OTHER_SOURCES = ("config-format", "hf-config-path", "load-format", "download-dir")
"""With these options a model may have no configuration of its own, or come from somewhere else."""
MODELSCOPE = "VLLM_USE_MODELSCOPE"
"""vLLM's environment variable: models come from another hub."""
A_MODEL = "the folder of a model, or the name of a model on the Hugging Face Hub"
Options = dict[str, str | None]


def refuse_mistakes(argv: Sequence[str], *, serves: bool = True) -> None:
    """Check a command line as far as that needs no vLLM.

    Args:
        argv: the model, if it is given, and options.
        serves: whether a server is to start, which needs its ports.

    Raises:
        ValueError, OSError: with this command line no server can start.
    """
    known = serve_options()
    options = given_options(argv, known)
    if {"help", "config"} & options.keys() or "-h" in argv:
        return
    refuse_unknown(options, known)
    refuse_values(options, serves)
    model = argv[0] if argv and not argv[0].startswith("-") else options.get("model")
    if model:
        refuse_missing_model(model, options)
    if serves:
        refuse_taken_ports(options)


def given_options(argv: Sequence[str], known: Iterable[str]) -> Options:
    """The options of a command line, without dashes at the front; of a repeated one the last value.

    A name may be shortened, as argparse lets it be, if it is then the beginning of one known name.
    """
    names = {*known, *OWN_OPTIONS}
    options: Options = {}
    for index, word in enumerate(argv):
        if not word.startswith("--") or word == "--":
            continue
        name, is_set, value = word.removeprefix("--").partition("=")
        first, dot, rest = name.partition(".")
        first = first.replace("_", "-")
        if first not in names:
            meaning = [full for full in names if full.startswith(first)]
            first = meaning[0] if len(meaning) == 1 else first
        follows = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("--") else None
        options[first + dot + rest] = value if is_set else follows
    return options


def refuse_unknown(options: Options, known: frozenset[str]) -> None:
    """Refuse an option that nobody has; its value may be a secret, and is not shown (raises ValueError)."""
    if not known:
        return
    names = {*known, *OWN_OPTIONS}
    stems = {*map(stem, names)}
    for name in options:
        first = name.partition(".")[0]
        if stem(first) in stems or any(full.startswith(first) for full in names):
            continue
        near = meant(first, names).replace("did you mean ", "did you mean --")
        raise ValueError(
            f"--{first} is refused: there is no such option{near}. Allowed: those of `starling serve --help=all`."
        )


def refuse_values(options: Options, serves: bool) -> None:
    """Refuse values of Starling's options and of --additional-config (raises ValueError)."""
    if any(name.startswith("additional-config.") for name in options):
        return  # vLLM puts the parts together
    text = options.get("additional-config")
    try:
        config = {} if text is None else json.loads(text)
    except ValueError as error:
        example = """JSON such as '{"starling": {"star": "auto"}}'"""
        raise OptionError("--additional-config", text, f"it is no JSON: {error}", example) from None
    values = {flag.dest: options[flag.option[2:]] for flag in FLAGS if options.get(flag.option[2:]) is not None}
    config = activate(config, values)
    parsed = parse_config(config)
    if serves and parsed is not None and parsed.library is not None:
        check_place(parsed.library, config[ENTRY][STAR_LIBRARY], f"--{STAR_LIBRARY.replace('_', '-')}")


def refuse_missing_model(model: str, options: Options) -> None:
    """Refuse a model that is neither on this machine nor can be on the hub (raises OptionError)."""
    path = Path(model).expanduser()
    if "://" in model or path.is_file() or any(option in options for option in OTHER_SOURCES):
        return
    if path.is_dir():
        if not any((path / name).exists() for name in CONFIG_FILES):
            reason = f"the folder has neither {' nor '.join(CONFIG_FILES)}"
            raise OptionError("MODEL", model, reason, A_MODEL)
    elif HUB_NAME.fullmatch(model):
        refuse_uncached(model, path)
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise OptionError("MODEL", model, f"there is no such folder{similar(path, model)}", A_MODEL)


def refuse_uncached(model: str, path: Path) -> None:
    """Refuse a model's name where the hub is not asked and its cache has no such model (raises OptionError)."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE or os.environ.get(MODELSCOPE, "").lower() in ("1", "true"):
        return
    if not (Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}").exists():
        reason = "there is no such folder, nor such a model in the cache of the hub, and HF_HUB_OFFLINE is set"
        raise OptionError("MODEL", model, reason + similar(path, model), A_MODEL)


def similar(path: Path, model: str) -> str:
    """ ", did you mean ..." where a folder beside a missing one has nearly its name; else nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = meant(path.name, names)
    return near.replace("did you mean ", f"did you mean {model.rstrip('/').removesuffix(path.name)}")


def refuse_taken_ports(options: Options) -> None:
    """Refuse ports that are no numbers or can't be used (raises OptionError, OSError)."""
    host = options.get("host")
    grpc = options.get(GRPC_PORT)
    ports = [] if any(option in options for option in NO_HTTP) else [(PORT, host or "", options.get(PORT, HTTP_PORT))]
    ports += [(GRPC_PORT, host or LOOPBACK, grpc)]
    ports += [(ADMIN_PORT, options.get("grpc-admin-host") or LOOPBACK, options.get(ADMIN_PORT))]
    owners: dict[int, str] = {}
    for option, address, port in ports:
        if port is None:
            continue
        number = number_of(f"--{option}", port)
        if number and number in owners:
            raise OptionError(
                f"--{option}", number, f"--{owners[number]} is the same", "a port of its own, or 0 for any"
            )
        owners[number] = option
        refuse_taken_port(f"--{option}", address, number)


def number_of(option: str, port: str) -> int:
    """A port's number (raises OptionError)."""
    if not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise OptionError(option, port, "it is no port", "0 to 65535")
    return int(port)


def refuse_taken_port(option: str, host: str, port: int) -> None:
    """Check that a port is free.

    Args:
        host: empty: all addresses of this machine.

    Raises:
        OSError: the port can't be used.
    """
    try:
        family = socket.getaddrinfo(host or "0.0.0.0", port)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        allowed = "a free port, or 0 for any" if option != "--port" else "a free port"
        refusal = f"it can't be used on {host or 'this machine'}: {reason}"
        raise OSError(f"{option}={port} is refused: {refusal}. Allowed: {allowed}.") from None
