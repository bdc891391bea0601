"""Print constraints that keep the installed packages at their versions while a wheel is installed beside them.

The requirements of the wheel itself are left out: the installed versions of those may be too old. Where NIXL is not
installed, it gets the version that the wheel's extra `cuda` names.

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


def required(wheel: str) -> list[str]:
    """What a wheel requires, with all extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    return headers.get_all("Requires-Dist") or []


def requirements(lines: list[str]) -> set[str]:
    """The names of the distributions that are required without extras."""
    names = (re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line)
    return {canonical(name[0]) for name in names if name}


def constraints(wheel: str) -> list[str]:
    """A line ``name==version`` for each installed distribution that the wheel does not require, and for NIXL."""
    lines = required(wheel)
    nixl = [match[1] for line in lines if (match := re.match(r"nixl==([\w.]+);.*extra == ['\"]cuda['\"]", line))]
    versions = dict.fromkeys(["nixl"], nixl[0]) if nixl else {}
    versions |= {canonical(found.name): found.version for found in distributions()}
    return [f"{name}=={versions[name]}" for name in sorted(versions.keys() - requirements(lines))]


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1])))
