"""The `starling` command. It loads vLLM, and a subcommand's own parser, only when the subcommand runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from starling.vllm_compat import versions

UNUSABLE = 2
FAILED = 1  # of selftest, whose 2 is a machine without a GPU


def usable(command: str) -> bool:
    """Whether Starling can extend the installed vLLM; prints the reason where it can't."""
    reason = versions.problem()
    if reason is not None:
        print(f"starling {command}: error: {reason}", file=sys.stderr)
    return reason is None


def serve(argv: Sequence[str]) -> int:
    """start the OpenAI server, and the gRPC server where --grpc-port is given"""
    if not usable("serve"):
        return UNUSABLE
    from starling.engine_ext.serving.cli.serve import run

    return run(argv)


def doctor(argv: Sequence[str]) -> int:
    """show what works on this machine, which backend is active, and what a prompt would cost"""
    from starling.engine_ext.serving.cli.doctor import run

    return run(argv)


def selftest(argv: Sequence[str]) -> int:
    """check whether Starling computes the right thing on this machine"""
    if not usable("selftest"):
        return FAILED
    from starling.selftest.command import run

    return run(argv)


def evaluate(argv: Sequence[str]) -> int:
    """measure what Star Attention costs in answers, on your model and prompts"""
    from starling.evaluation.commands.eval import run

    return run(argv)


def tune(argv: Sequence[str]) -> int:
    """find the cheapest star plan whose loss on your prompts stays within a budget"""
    from starling.evaluation.commands.tune import run

    return run(argv)


def setup_cpu(argv: Sequence[str]) -> int:
    """install vLLM for CPUs into this environment"""
    from starling.engine_ext.serving.cli.setup_cpu import run

    return run(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "doctor": doctor,
    "selftest": selftest,
    "eval": evaluate,
    "tune": tune,
    "setup-cpu": setup_cpu,
}


def version() -> str:
    """Starling's and vLLM's version."""
    own = importlib.metadata.version("vllm-starling")
    return f"starling {own} (vLLM {versions.vllm_version() or 'not installed'})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 where this installation or the arguments are unusable."""
    commands = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="starling",
        description="vLLM with Star Attention and a gRPC front.",
        epilog=f"commands:\n{commands}\n\n`starling COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    args = parser.parse_args(argv)
    return COMMANDS[args.command](args.arguments)


if __name__ == "__main__":
    sys.exit(main())
