"""Loads the CPU op where that can't work, each time in a forked process. Run in a mount namespace of its own.

`python -m tests.kernels.cpu.load_job FOLDER` prints as JSON with which warning the fallback runs in each case.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from starling.attention_backends.kernels.cpu import build, fallback, paged_op
from tests.kernels.cases import one_row

NOBODY = 54321  # a user without an entry in the password file


def use_cache(folder: Path, op: Path) -> Path:
    """Let the cache of built ops be a new file system in memory; returns the op's copy there."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    extensions = folder / "starling" / "extensions"
    extensions.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return Path(shutil.copy(op, extensions))


def noexec(folder: Path, op: Path) -> None:
    use_cache(folder, op)
    subprocess.run(["mount", "-o", "remount,noexec", folder], check=True)


def cut_off(folder: Path, op: Path) -> None:
    os.truncate(use_cache(folder, op), op.stat().st_size // 2)
    os.environ["CXX"] = "no-such-compiler"


def read_only(folder: Path, op: Path) -> None:
    use_cache(folder, op).unlink()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def no_home(folder: Path, op: Path) -> None:
    os.environ.pop("XDG_CACHE_HOME", None)
    os.environ.pop("HOME", None)
    os.setuid(NOBODY)


def in_child(function: Callable[[], str]) -> str:
    """The result of a function that runs in a forked process.

    Raises:
        RuntimeError: the process ended otherwise.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, function().encode())
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise RuntimeError(f"exit code {status}")
    return text


def warning(prepare: Callable[[Path, Path], None], folder: Path, op: Path) -> str:
    """The warning with which the fallback runs in place of the op, after ``prepare(folder, op)``."""
    prepare(folder, op)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    paged_op.logger.addHandler(handler)
    for _ in range(2):
        one_row(3, 20).run(paged_op.paged_attention)
    one_row(3, 20).run(fallback.paged_attention)
    (record,) = records
    return record.getMessage()


def build_op() -> str:
    """Build the op, unless it is there; returns its path."""
    build.load_op()
    return str(build.built_op_path(build.cache_directory()))


if __name__ == "__main__":
    root, op = Path(sys.argv[1]), Path(in_child(build_op))
    os.environ.pop("TORCH_EXTENSIONS_DIR", None)
    cases = (noexec, cut_off, read_only, no_home)
    print(json.dumps({case.__name__: in_child(partial(warning, case, root / case.__name__, op)) for case in cases}))
