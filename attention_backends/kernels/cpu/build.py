"""Builds the CPU op on first use, once per user, source, torch version and processor.

`python -m attention_backends.kernels.cpu.build` builds it ahead of the first request.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = "attention.cpp"
SOURCES = (SOURCE, "gemm.h", "vector.h")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-Wno-psabi")


class BuildError(RuntimeError):
    """The op can't be built on this machine; the message gives the reason and a remedy."""


def cache_directory() -> Path:
    """The directory of built ops: TORCH_EXTENSIONS_DIR, as for torch's own extensions, else one in the user's cache."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(extensions) if extensions else cache / "starling" / "extensions"


def compiler() -> str | None:
    """Path of the C++ compiler that CXX names, else of the system's; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def cpu_flags() -> str:
    """The processor's features, which -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def key() -> str:
    """A hash of everything that the built op depends on: sources, flags, torch version and processor."""
    here = Path(__file__).parent
    parts = [(here / name).read_text() for name in SOURCES]
    parts += [torch.__version__, platform.machine(), cpu_flags(), *FLAGS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_op() -> Callable[..., torch.Tensor]:
    """Load the op, after building it where that has not been done. Concurrent processes wait for one build.

    Raises:
        BuildError: there is no compiler or no writable directory, or the compiler fails.
    """
    directory, name = cache_directory(), f"starling_kernels_{key()}"
    built = directory / f"{name}.so"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The system releases the lock of a process that dies, so no process waits for a build that has stopped.
        with open(directory / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.exists():
                _build(name, built)
    except OSError as error:
        raise BuildError(f"the CPU attention op needs a directory to build in: {error}; set XDG_CACHE_HOME") from error
    torch.ops.load_library(built)
    return torch.ops.starling_kernels.paged_attention


def _build(name: str, built: Path) -> None:
    """Compile to ``built``. The file appears complete or not at all (raises BuildError)."""
    command = os.environ.get("CXX", "c++")
    if compiler() is None:
        raise BuildError(
            f"the CPU attention op is compiled on first use, and there is no C++ compiler {command!r}: install g++ 12 "
            "or newer, or name one in CXX"
        )
    # torch looks for ninja on PATH only, which lacks the environment's scripts where it was not activated.
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((scripts, path))
    try:
        from torch.utils import cpp_extension

        with tempfile.TemporaryDirectory(dir=built.parent, prefix=name) as work:
            cpp_extension.load(
                name=name,
                sources=[str(Path(__file__).parent / SOURCE)],
                extra_cflags=list(FLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=work,
                is_python_module=False,
            )
            # torch appends a number to the file's name after an earlier attempt in the same process.
            os.replace(next(Path(work).glob("*.so")), built)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        raise BuildError(f"the CPU attention op does not compile with {command!r}: {error}") from error
    finally:
        os.environ["PATH"] = path


if __name__ == "__main__":
    print(load_op())
