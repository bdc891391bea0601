"""The `starling` command. It loads vLLM, and a subcommand's own parser, only when the subcommand runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starling.config.parsing import meant
from starling.vllm_compat import versions
from starling.vllm_compat.logs import hide_missing_triton

hide_missing_triton()  # here, before vLLM is imported: processes that a server spawns import this module too

UNUSABLE = 2
FAILED = 1  # of selftest, whose 2 is a machine without a GPU


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: module whose ``run(arguments)`` returns the exit code.
        summary: description for the help.
        without_vllm: exit code if Starling can't extend the installed vLLM, or None if the command needs no vLLM.
    """

    module: str
    summary: str
    without_vllm: int | None = None

    def __call__(self, name: str, arguments: Sequence[str]) -> int:
        """Run the command and return its exit code."""
        reason = None if self.without_vllm is None else versions.problem()
        if reason is not None and self.without_vllm is not None:
            print(f"starling {name}: error: {reason}", file=sys.stderr)
            return self.without_vllm
        return importlib.import_module(f"starling.{self.module}").run(arguments)


CLI = "engine_ext.serving.cli"
FIRST = {
    "serve": Command(
        f"{CLI}.start_checks", "start the OpenAI server, and the gRPC server where --grpc-port is given", UNUSABLE
    ),
    "doctor": Command(
        "lab.doctor.doctor", "show what works on this machine, which backend is active, and what a prompt would cost"
    ),
    "advise": Command(
        "lab.evaluation.commands.advise", "measure your prompts, and print one command with what it gains and costs"
    ),
    "setup-cpu": Command(f"{CLI}.setup_cpu", "install vLLM for CPUs into this environment"),
}
"""Commands that set up and run a server."""

OTHERS = {
    "eval": Command(
        "lab.evaluation.commands.eval", "measure what Star Attention costs in answers, on your model and prompts"
    ),
    "calibrate": Command(
        "lab.calibration.calibrate", "find the KV heads that cause star's loss in answers, for star_dense_heads"
    ),
    "distil": Command("lab.distillation.distil", "train an adapter with which documents, or star blocks, lose less"),
    "selftest": Command(
        "lab.selftest.selftest", "check whether Starling computes the right thing on this machine", FAILED
    ),
    "warm": Command("lab.evaluation.commands.warm", "have a server compute documents, so that they are in its library"),
}
COMMANDS = FIRST | OTHERS


def version() -> str:
    """Return the versions of Starling and vLLM."""
    own = importlib.metadata.version("vllm-starling")
    return f"starling {own} (vLLM {versions.vllm_version() or 'not installed'})"


def listed(title: str, commands: Mapping[str, Command]) -> str:
    """Return a group of commands as text for the help."""
    return "\n".join([f"{title}:", *(f"  {name:10} {command.summary}" for name, command in commands.items()), "\n"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, which is 2 if this installation or the arguments are unusable."""
    parser = argparse.ArgumentParser(
        prog="starling",
        description="vLLM whose prompts find the KV cache of their documents in any order, and whose long prompts have "
        "their\nfirst token sooner, by star blocks. Over HTTP, and over gRPC beside it.",
        epilog=f"{listed('commands', FIRST)}{listed('to measure, train and fill', OTHERS)}"
        "`starling COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    name = next(iter(sys.argv[1:] if argv is None else argv), "")
    if name not in COMMANDS and not name.startswith("-"):
        parser.error(f"there is no command {name!r}{meant(name, COMMANDS)}. Allowed: {', '.join(COMMANDS)}.")
    args = parser.parse_args(argv)
    return COMMANDS[args.command](args.command, args.arguments)


if __name__ == "__main__":
    sys.exit(main())
