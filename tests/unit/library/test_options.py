"""`--star-library DIR[:SIZE]`."""

from __future__ import annotations

from pathlib import Path

import pytest

from starling.config.entry import parse_config
from starling.config.library import LibraryOptions, parse_library
from starling.config.parsing import OptionError


@pytest.mark.parametrize(
    ("text", "folder", "host_bytes"),
    [
        ("/pages", "/pages", 4 * 2**30),
        ("/pages:16GiB", "/pages", 16 * 2**30),
        ("/pages:1.5 GB", "/pages", 1_500_000_000),
        (":512MiB", None, 512 * 2**20),
        ("/a:b:2G", "/a:b", 2_000_000_000),
        ("/a:b/c", "/a:b/c", 4 * 2**30),
    ],
)
def test_a_folder_a_size_or_both(text: str, folder: str | None, host_bytes: int) -> None:
    assert parse_library(text, "star_library") == LibraryOptions(None if folder is None else Path(folder), host_bytes)


@pytest.mark.parametrize("value", ["", 4, None, ["/pages"], ":0", ":12", "/pages:7pages", ":1..5GiB"])
def test_all_else_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"star_library=.* is refused: .*Allowed: "):
        parse_library(value, "star_library")


def test_the_entry_has_it() -> None:
    config = parse_config({"starling": {"star_library": "/pages"}})
    assert config is not None
    assert config.library == LibraryOptions(Path("/pages"), 4 * 2**30)
    assert parse_config({"starling": {}}).library is None  # type: ignore[union-attr]
