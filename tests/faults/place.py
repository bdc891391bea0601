"""A mount namespace with its own /tmp and /dev/shm: what a server leaves there can be counted, and they can be full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "STARLING_FAULTS"
"""The variable by which the processes of a place are found, also once their parent is gone."""

MOUNT = "mount -t tmpfs -o size={tmp} tmpfs /tmp && mount -t tmpfs -o size={shm} tmpfs /dev/shm && echo && exec cat"


class Place:
    """The namespace, which a process that waits for its standard input keeps alive."""

    def __init__(self, keeper: subprocess.Popen) -> None:
        self.keeper = keeper
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
        """What is in /tmp and /dev/shm, except for empty files, such as sockets."""
        return sorted(
            f"{folder}/{path.relative_to(self.path(folder))}"
            for folder in ("/tmp", "/dev/shm")
            for path in self.path(folder).rglob("*")
            if path.lstat().st_size and not path.is_dir()
        )

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
def place(tmp: str = "64m", shm: str = "2g") -> Iterator[Place]:
    """A place for the duration of the block; then all of its processes are killed.

    Args:
        tmp, shm: sizes of /tmp and /dev/shm, as `mount` takes them.
    """
    keeper = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", MOUNT.format(tmp=tmp, shm=shm)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {MARK: "keeper"},
    )
    assert keeper.stdin is not None and keeper.stdout is not None
    try:
        if keeper.stdout.readline() != b"\n":
            raise RuntimeError("a mount namespace can't be made: this needs root")
        here = Place(keeper)
        yield here
        for process in here.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()
