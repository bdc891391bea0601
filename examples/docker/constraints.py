"""Print constraints that keep the installed packages at their versions while a wheel is installed beside them.

The requirements of the wheel itself are left out: the installed versions of those may be too old.

python3 constraints.py dist/vllm_starling-0.1.0-py3-none-any.whl > constraints.txt
"""

import re
import sys
import zipfile
from email.parser import HeaderParser
from importlib.metadata import distributions


def canonical(name: str) -> str:
    """A distribution's name in the form in which two spellings of it are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(wheel: str) -> set[str]:
    """The names of the distributions that a wheel requires without extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    lines = headers.get_all("Requires-Dist") or []
    names = (re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line)
    return {canonical(name[0]) for name in names if name}


def constraints(wheel: str) -> list[str]:
    """A line ``name==version`` for each installed distribution that the wheel does not require."""
    installed = {canonical(found.name): found.version for found in distributions()}
    return [f"{name}=={installed[name]}" for name in sorted(installed.keys() - requirements(wheel))]


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1])))
