"""Builds the wheel and the sdist into dist/, checks both, and installs the wheel as a user would: `make release`.

For each Python, a new environment gets the wheel by pip and vLLM by `starling setup-cpu`. Then `starling doctor`,
`vllm --version` and `starling selftest --quick` run there; the last one generates tokens with a tiny random model.
Needs uv, on PATH or in .venv, and git. Results are also in build/release, for `make compatibility`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
BUILD_OPTIONS = ("--build-constraints", ROOT / ".ci/requirements-build.lock", "--require-build-hashes")
RESULTS = ROOT / "build" / "release"
PYTHONS = ("3.11", "3.12", "3.13")
SOURCES = ROOT / "starling"
PACKAGES = {  # folder of the repository -> package in the wheel; starling/ has a link to each other folder
    **{
        str(link.resolve().relative_to(ROOT)): f"starling/{link.name}"
        for link in sorted(SOURCES.iterdir())
        if link.is_symlink()
    },
    "starling": "starling",
}
REQUIRED = ("starling/engine_ext/serving/http/live_page.html", "starling/py.typed")
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
RELATIVE_LINK = re.compile(r"\]\((?!https?://)([^)]*)\)")
SELFTEST, REPORT = ("--quick", "--report", "report"), "report/report.json"
NO_GPU = 2
"""The exit code of `starling selftest` for a machine without a GPU whose CPU part passed."""


class ReleaseError(RuntimeError):
    """The release can't be made; the message says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help=f"interpreters to test; default: {', '.join(PYTHONS)}, if found")
    parser.add_argument("--torch", choices=("cpu", "pypi"), default="cpu", help="the option of `starling setup-cpu`")
    args = parser.parse_args()
    try:
        uv = find_uv()
        wheel = build(uv)
        results = {}
        for name in args.pythons or PYTHONS:
            python = find_python(uv, name)
            if python is None and args.pythons:
                raise ReleaseError(f"{name} is no Python that runs")
            results[name] = test_install(python, wheel, args.torch) if python else None
    except ReleaseError as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    say(f"{wheel.name} and its sdist are in dist/")
    for name, result in results.items():
        print(summary(result) if result else f"Python {name}: NOT TESTED: no such interpreter was found")
    for name in PYTHONS if args.pythons else ():
        if not any(result["python"].startswith(f"{name}.") for result in results.values()):
            print(f"Python {name}: NOT TESTED: PYTHONS= does not have it")
    return 0


def summary(result: dict[str, Any]) -> str:
    seconds = f"{result['seconds']:.0f} s"
    return f"Python {result['python']}: vLLM {result['vllm']}, torch {result['torch']}: {result['result']}, {seconds}"


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def call(*command: str | Path, cwd: Path = ROOT, allowed: Iterable[int] = (0,), capture: bool = False) -> str:
    """Run a command; returns its standard output if ``capture``, which is not shown then.

    Raises:
        ReleaseError: its exit code is not an allowed one.
    """
    words = [str(word) for word in command]
    if not capture:
        print(f"$ {shlex.join(words)}", flush=True)
    done = subprocess.run(words, cwd=cwd, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode not in allowed:
        raise ReleaseError(f"exit code {done.returncode}: {shlex.join(words)}")
    return done.stdout or ""


def find_uv() -> str:
    uv = shutil.which("uv") or shutil.which("uv", path=str(ROOT / ".venv/bin"))
    if uv is None:
        raise ReleaseError("uv is neither on PATH nor in .venv: install it, or run `make env`")
    return uv


def find_python(uv: str, name: str) -> str | None:
    """Return the interpreter of a version, a command or a path; None where there is none that runs."""
    found = subprocess.run([uv, "python", "find", "--system", name], capture_output=True, text=True)
    for candidate in (found.stdout.strip(), name, f"python{name}"):
        path = shutil.which(candidate) if candidate else None
        if path and subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return path
    return None


def build(uv: str) -> Path:
    """Build and check both distributions; returns the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    say("building the sdist, and the wheel from the sdist")
    call(uv, "build", "--quiet", *BUILD_OPTIONS, "--out-dir", DIST)
    (wheel,) = DIST.glob("*.whl")
    (sdist,) = DIST.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        call(uv, "build", "--quiet", *BUILD_OPTIONS, "--wheel", "--out-dir", folder)
        if digest(Path(folder) / wheel.name) != digest(wheel):
            raise ReleaseError("the wheel from the sdist is not the wheel from the checkout")
    say("checking them")
    call(uv, "tool", "run", "twine", "check", "--strict", wheel, sdist)
    tracked = call("git", "ls-files", *PACKAGES, capture=True).splitlines()
    links = set(PACKAGES.values())
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        problems = wheel_problems(names, set(tracked) - links)
        for name in names:
            if name.endswith(".dist-info/METADATA"):
                problems += readme_problems(archive.read(name).decode())
    if problems:
        raise ReleaseError("; ".join(problems))
    return wheel


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel_problems(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Return what is wrong with the files of a wheel.

    Args:
        names: of the files in the wheel.
        tracked: the files that git has in PACKAGES.
    """
    expected = set(REQUIRED)
    for path in tracked:
        folder = next(folder for folder in PACKAGES if path.startswith(f"{folder}/"))
        expected.add(PACKAGES[folder] + path.removeprefix(folder))
    found, metadata = set(), set()
    for name in names:
        folder, _, rest = name.partition("/")
        if folder.endswith(".dist-info"):
            metadata.add(rest)
        else:
            found.add(name)
    return [
        *(f"the wheel lacks {name}" for name in sorted(expected - found)),
        *(f"the wheel has {name}, which git does not" for name in sorted(found - expected)),
        *(f"the wheel's metadata lacks {name}" for name in sorted(set(METADATA) - metadata)),
        *(f"the wheel's metadata has {name}" for name in sorted(metadata - set(METADATA))),
    ]


def readme_problems(text: str) -> list[str]:
    """Return the links of a wheel's README that a package index would show broken: to files of the repository."""
    return [f"the wheel's README has a link to {found}" for found in RELATIVE_LINK.findall(text)]


def test_install(python: str, wheel: Path, torch: str) -> dict[str, Any]:
    """Install the wheel and vLLM into an empty environment and use them; returns versions and the result.

    Raises:
        ReleaseError: a command failed, or no engine of the self-test started.
    """
    version = call(python, "--version", capture=True).strip().removeprefix("Python ")
    say(f"installing with Python {version} ({python})")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="starling-release-") as name:
        folder = Path(name)
        programs = folder / "venv/bin"
        call(python, "-m", "venv", "venv", cwd=folder)
        call(programs / "pip", "install", "--quiet", wheel, cwd=folder)
        call(programs / "starling", "--version", cwd=folder)
        call(programs / "starling", "setup-cpu", *(["--torch", torch] if torch != "cpu" else []), cwd=folder)
        call(programs / "starling", "doctor", cwd=folder)
        call(programs / "vllm", "--version", cwd=folder)
        call(programs / "starling", "selftest", *SELFTEST, cwd=folder, allowed=(0, NO_GPU))
        report = json.loads((folder / REPORT).read_text())
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    if not any(verdict == "PASS" for name, verdict in verdicts.items() if name.endswith("engines start")):
        raise ReleaseError(f"Python {version}: no engine of the self-test started")
    passed = list(verdicts.values()).count("PASS")
    machine = report["machine"]
    result = {
        "python": version,
        "vllm": machine["vLLM"],
        "torch": machine["torch"],
        "result": f"installed, {passed} checks of the self-test passed",
        "seconds": round(time.monotonic() - start),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{version}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
