"""Builds the CPU op on first use, once per user, source, torch version, compiler, C library and processor.

`python -m starling.attention_backends.kernels.cpu.build` builds it ahead of the first request.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def seal(path: Path) -> None:
    """Append the digest of a file's content to the file."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)


def is_intact(path: Path) -> bool:
    """Return whether a file exists, can be read, and has the content that it was sealed with."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


COMPILED = ("attention.cpp", "attamba.cpp", "lora.cpp")
SOURCES = (
    *COMPILED,
    *(f"{name}.h" for name in ("attend", "call", "chunks", "gemm", "join", "mix", "recent", "run", "tiles", "vector")),
)
OPS = ("paged_attention", "rerotated_attention", "attamba_plan", "attamba_mix", "attamba_attend", "add_lora")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-Wno-psabi")


class BuildError(RuntimeError):
    """The op can't be built or loaded on this machine; the message gives the reason and a remedy."""


def cache_directory() -> Path:
    """Return the directory of built ops: TORCH_EXTENSIONS_DIR, as for torch's extensions, or one in the user's cache.

    Raises:
        BuildError: the user has no home directory, and neither variable is set.
    """
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    if extensions:
        return Path(extensions)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise BuildError(f"the CPU attention op needs a directory to build in: {error} Set XDG_CACHE_HOME") from error
    return cache / "starling" / "extensions"


def compiler() -> str | None:
    """Path of the C++ compiler that CXX names, else of the system's; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def cpu_flags() -> str:
    """Return the processor's features, which -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compiler_version() -> str | None:
    """Return the compiler's path and version text, or None if there is no compiler or it fails."""
    path = compiler()
    if path is None:
        return None
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, check=True, timeout=60, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{os.path.realpath(path)}\0{shown.stdout}"


def c_library() -> str:
    """Name and version of the C library that this process runs with."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except ValueError:  # not glibc
        return " ".join(platform.libc_ver())


def digest(parts: Sequence[str]) -> str:
    """Return a short digest of the texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def machine_key() -> str:
    """Return a digest of everything a built op depends on: sources, flags, torch, C library and processor."""
    here = Path(__file__).parent
    parts = [(here / name).read_text() for name in SOURCES]
    return digest([*parts, torch.__version__, c_library(), platform.machine(), cpu_flags(), *FLAGS])


def built_op_path(directory: Path) -> Path:
    """Return the file of the op of this machine and compiler.

    Without a compiler, it is an op that any compiler has built for this machine, for example in an image from which the
    compiler was removed.
    """
    prefix, version = f"starling_kernels_{machine_key()}", compiler_version()
    built = directory / f"{prefix}_{digest([version or ''])}.so"
    if version is None:
        return next((path for path in sorted(directory.glob(f"{prefix}_*.so")) if is_intact(path)), built)
    return built


def load_op() -> Any:
    """Load the ops after building them where they are not intact.

    Concurrent processes wait for one build.

    An op that is there is read only: the directory need not be writable then.

    Raises:
        BuildError: there is no compiler or no writable directory, the compiler fails, or the op can't be loaded.
    """
    directory = cache_directory()
    built = built_op_path(directory)
    if not is_intact(built):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The system releases the lock of a process that dies, so no process waits for a build that has stopped.
            with open(built.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not is_intact(built):
                    _build(built)
        except OSError as error:
            reason = f"the CPU attention op needs a directory to build in: {error}; set XDG_CACHE_HOME"
            raise BuildError(reason) from error
    try:
        torch.ops.load_library(built)
        ops = torch.ops.starling_kernels
        for name in OPS:
            getattr(ops, name)
        return ops
    except (OSError, AttributeError) as error:
        reason = f"the CPU attention op can't be loaded: {error}; set XDG_CACHE_HOME to a directory that allows it"
        raise BuildError(reason) from error


def _build(built: Path) -> None:
    """Compile to ``built``. The file appears complete or not at all (raises BuildError)."""
    name = built.stem
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
            try:
                cpp_extension.load(
                    name=name,
                    sources=[str(Path(__file__).parent / name) for name in COMPILED],
                    extra_cflags=list(FLAGS),
                    extra_ldflags=["-fopenmp"],
                    build_directory=work,
                    is_python_module=False,
                )
            except OSError:  # torch loads what it has compiled, and so does load_op, which says what is wrong
                if not any(Path(work).glob("*.so")):
                    raise
            # torch appends a number to the file's name after an earlier attempt in the same process.
            compiled = next(Path(work).glob("*.so"))
            seal(compiled)
            os.replace(compiled, built)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        raise BuildError(f"the CPU attention op does not compile with {command!r}: {error}") from error
    finally:
        os.environ["PATH"] = path


if __name__ == "__main__":
    print(load_op())
