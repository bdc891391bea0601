"""The names of the options of `vllm serve`, read from vLLM's source: to import vLLM takes seconds."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from starling.vllm_compat.patching import touches

FLAG = re.compile(r'"--([a-z][a-z0-9_-]*)"')
FIELD = re.compile(r"^    ([a-z][a-z0-9_]*):", re.MULTILINE)  # of a dataclass of which vLLM makes options
SWITCHES = ("no-", "enable-", "disable-")


@touches("vllm.engine.arg_utils.EngineArgs.add_cli_args", "vllm.entrypoints.cli.serve.ServeSubcommand.subparser_init")
def serve_options() -> frozenset[str]:
    """The options' names without their dashes at the front; empty where they can't be known so.

    More names than there are options: a name that is not among them is none. A platform of another package may add
    options. Goes when vLLM has a parser that needs no torch.
    """
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations or entry_points(group="vllm.platform_plugins"):
        return frozenset()
    folder = Path(spec.submodule_search_locations[0])
    files = [folder / "engine/arg_utils.py", folder / "entrypoints/cli/serve.py"]
    files += folder.glob("entrypoints/**/cli_args.py")
    found: set[str] = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        found.update(*(pattern.findall(text) for pattern in (FLAG, FIELD)))
    return frozenset(name.replace("_", "-") for name in found)


def stem(name: str) -> str:
    """An option's name without what makes a switch of it: vLLM has --no-X and --disable-X where it has --enable-X."""
    for prefix in SWITCHES:
        name = name.removeprefix(prefix)
    return name
