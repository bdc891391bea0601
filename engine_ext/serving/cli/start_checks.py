"""Checks of `starling serve` before it imports vLLM: Starling's own options, and a model that is not there.

Everything is checked again after the import, which takes seconds, together with the contents of a `--config` file.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from starling.config.entry import ENTRY, STAR_LIBRARY, parse_config
from starling.config.library import check_place
from starling.config.parsing import OptionError, meant
from starling.engine_ext.serving.cli.serve_args import FLAGS, activate

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CONFIG_FILES = ("config.json", "params.json")
OTHER_SOURCES = ("config-format", "hf-config-path", "load-format", "download-dir")
"""Options with which a model may have no configuration of its own, or come from somewhere else."""
MODELSCOPE = "VLLM_USE_MODELSCOPE"
"""Environment variable of vLLM with which models come from another hub."""
A_MODEL = "the folder of a model, or the name of a model on the Hugging Face Hub"
Options = dict[str, str | None]


def refuse_mistakes(argv: Sequence[str], *, serves: bool = True) -> None:
    """Check a command line as far as that is possible without vLLM.

    Args:
        argv: the model, if it is given, and options.
        serves: whether a server is to start, which needs the place of its library.

    Raises:
        ValueError: no server can start with this command line.
    """
    options = given_options(argv)
    if {"help", "config"} & options.keys() or "-h" in argv:
        return
    refuse_values(options, serves)
    model = argv[0] if argv and not argv[0].startswith("-") else options.get("model")
    if model:
        refuse_missing_model(model, options)


def given_options(argv: Sequence[str]) -> Options:
    """Return the options of a command line, without leading dashes; for a repeated option its last value."""
    options: Options = {}
    for index, word in enumerate(argv):
        if not word.startswith("--") or word == "--":
            continue
        name, is_set, value = word.removeprefix("--").partition("=")
        first, dot, rest = name.partition(".")
        follows = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("--") else None
        options[first.replace("_", "-") + dot + rest] = value if is_set else follows
    return options


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
    """Refuse a model that is not on this machine and can't be on the hub (raises OptionError)."""
    path = Path(model).expanduser()
    # argparse lets options be shortened.
    elsewhere = any(name.startswith(option) for name in OTHER_SOURCES for option in options)
    if "://" in model or path.is_file() or elsewhere:
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
    """Refuse the name of a model that is not in the hub's cache, if the hub is offline or the name means a folder.

    The name means a folder if its parent folder exists, as with models/nowhere beside models/. Without a network,
    asking the hub would take half a minute.

    Raises:
        OptionError: the model is not in the cache.
    """
    from huggingface_hub import constants

    if os.environ.get(MODELSCOPE, "").lower() in ("1", "true"):
        return
    if (Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}").exists():
        return
    near, parent = similar(path, model), model.partition("/")[0]
    if constants.HF_HUB_OFFLINE:
        reason = f"there is no such folder, nor such a model in the cache of the hub, and HF_HUB_OFFLINE is set{near}"
        raise OptionError("MODEL", model, reason, A_MODEL)
    if "/" in model and Path(parent).is_dir():
        reason = f"there is no such folder in {parent}/, nor such a model in the cache of the hub{near}"
        allowed = f"{A_MODEL}; one that has to be downloaded, where there is no folder {parent}/"
        raise OptionError("MODEL", model, reason, allowed)


def similar(path: Path, model: str) -> str:
    """Return `, did you mean ...` if a folder beside a missing one has a similar name, else an empty text."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = meant(path.name, names)
    return near.replace("did you mean ", f"did you mean {model.rstrip('/').removesuffix(path.name)}")


UNUSABLE = 2


def run(argv: Sequence[str]) -> int:
    """Serve until a signal, and return the exit code of serve.py, or 2 for a mistake in the command line."""
    try:
        refuse_mistakes(argv)
    except ValueError as error:
        print(f"starling serve: error: {error}", file=sys.stderr)
        return UNUSABLE
    from starling.engine_ext.serving.cli.serve import run as serve

    return serve(argv)
