"""A mount namespace with its own /tmp and /dev/shm: what a server leaves there can be counted, and they can be full.

What a server reads is seen in it wherever it lies: the checkout, the environment and the user's home.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import psutil

from starling.attention_backends.kernels.cpu.build import BuildError, cache_directory

MARK = "STARLING_FAULTS"
"""The variable by which the processes of a place are found, also once their parent is gone."""

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("/dev/shm", "/tmp")

# $1 is a folder, $2 the size of the file system that takes its place, $3 where it is made ready, and each further
# argument a folder below $1 that is seen in it as well.
COVER = """set -e
cover() {
  folder=$1 size=$2 new=$3
  shift 3
  mount -t tmpfs -o size="$size" tmpfs "$new"
  for shown; do
    mkdir -p "$new${shown#"$folder"}"
    mount --bind "$shown" "$new${shown#"$folder"}"
  done
  mount --move "$new" "$folder"
}
"""


def needed() -> set[Path]:
    """The folders that a server reads, by the names that it has for them and by those without links."""
    named = {ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, filter(os.path.isabs, sys.path))}
    with contextlib.suppress(RuntimeError):
        named.add(Path.home())
    with contextlib.suppress(BuildError):
        named.add(cache_directory())
    return {path for each in named for path in (each, each.resolve()) if path.is_dir()}


def shown_below(folder: str, paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that lie below a folder, without those that lie below another one of them."""
    below = sorted(path for path in paths if Path(folder) in path.parents)
    return [path for path in below if not any(other in path.parents for other in below)]


class Place:
    """The namespace, which a process that waits for its standard input keeps alive.

    Attributes:
        shown: folders of this process that are seen in the namespace's /tmp and /dev/shm.
    """

    def __init__(self, keeper: subprocess.Popen, shown: Iterable[Path] = ()) -> None:
        self.keeper = keeper
        self.shown = frozenset(map(str, shown))
        self.mark = f"{MARK}={keeper.pid}"

    def path(self, path: str) -> Path:
        """A path of the namespace, as this process sees it."""
        return Path(f"/proc/{self.keeper.pid}/root{path}")

    def prefix(self, environment: dict[str, str]) -> list[str]:
        """The command that runs another one in the namespace, in its own process."""
        variables = {"TMPDIR": "/tmp"} | environment
        enter = ["nsenter", f"--mount=/proc/{self.keeper.pid}/ns/mnt", "env", self.mark]
        return [*enter, *(f"{name}={value}" for name, value in variables.items())]

    def files(self) -> list[str]:
        """What is in /tmp and /dev/shm, except for empty files, such as sockets, and what is of this process."""
        root, found = str(self.path("")), []
        for start in FOLDERS:
            for name, folders, files in os.walk(root + start):
                folder = name.removeprefix(root)
                folders[:] = [each for each in folders if f"{folder}/{each}" not in self.shown]
                found += [f"{folder}/{file}" for file in files if os.lstat(f"{name}/{file}").st_size]
        return sorted(found)

    def processes(self) -> list[psutil.Process]:
        """All processes that were started in the namespace and still run, zombies excluded."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if self.mark.encode() in variables and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def fill(self, folder: str) -> None:
        """Leave no byte free in a folder's file system."""
        with self.path(f"{folder}/filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(65536)):
                pass
            while file.write(b"\0"):
                pass

    def unfill(self, folder: str) -> None:
        """Undo `fill`."""
        self.path(f"{folder}/filler").unlink()


@contextlib.contextmanager
def place(tmp: str = "64m", shm: str = "2g", shown: Iterable[Path] = ()) -> Iterator[Place]:
    """A place for the duration of the block; then all of its processes are killed.

    Args:
        tmp, shm: sizes of /tmp and /dev/shm, as `mount` takes them.
        shown: folders that are seen in the place, beside those of ``needed``.
    """
    sizes = {"/tmp": tmp, "/dev/shm": shm}
    visible = {folder: shown_below(folder, {*needed(), *shown}) for folder in FOLDERS}
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="place-") as new:
        calls = [["cover", folder, sizes[folder], new, *map(str, visible[folder])] for folder in FOLDERS]
        script = "\n".join([COVER, *map(shlex.join, calls), "echo", "exec cat"])
        keeper = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {MARK: "keeper"},
        )
        assert keeper.stdin is not None and keeper.stdout is not None
        try:
            if keeper.stdout.readline() != b"\n":
                raise RuntimeError("a mount namespace can't be made: this needs root")
            here = Place(keeper, chain(*visible.values()))
            yield here
            for process in here.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        finally:
            keeper.stdin.close()
            keeper.wait()
            keeper.stdout.close()
