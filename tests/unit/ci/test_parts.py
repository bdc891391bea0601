"""Each capability that the README names has its tests in `make test`, and each test runs in one of both parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.parts import CAPABILITIES, PLAIN_VLLM, REST, is_first, split

ROOT = Path(__file__).parents[3]
PARITY, SERVER = "tests/parity/", "tests/e2e/"
WITHOUT_PARITY = {"replicas.md", "routers.md", "grpc.md", "eval.md"}
"""What these do is compared with one server, over HTTP: there is no other attention."""


def test_the_readme_names_these_capabilities() -> None:
    listed = (ROOT / "README.md").read_text().split("## What you get")[1].split("\n## ")[0]
    linked = {match[1] for match in re.finditer(r"^- .*?\]\(docs/([\w-]+\.md)", listed, re.MULTILINE)}
    linked |= {match[1] for match in re.finditer(r"\]\(docs/((?:kv-shifting|attamba|dense-heads|eval)\.md)", listed)}
    assert linked == CAPABILITIES.keys()


@pytest.mark.parametrize("page", CAPABILITIES)
def test_a_capability_has_its_parity_and_a_server(page: str) -> None:
    names = CAPABILITIES[page]
    assert any(name.startswith(SERVER) for name in names)
    assert page in WITHOUT_PARITY or any(name.startswith(PARITY) for name in names)


@pytest.mark.parametrize("name", [*PLAIN_VLLM, *(name for names in CAPABILITIES.values() for name in names)])
def test_these_tests_exist(name: str) -> None:
    file, _, test = name.partition("::")
    assert re.search(rf"^(async )?def {re.escape(test.partition('[')[0])}", (ROOT / file).read_text(), re.MULTILINE)


def test_a_test_runs_in_one_part() -> None:
    names = ["tests/unit/test_docs.py::test_a", "tests/parity/test_attamba.py::test_compiled", PLAIN_VLLM[0], *REST]
    assert list(map(is_first, names)) == [True, False, True, *(False for _ in REST)]
    assert split(names, "first") == [names[0], names[2]]
    assert split(names, "rest") == [names[1], *REST]
    assert split(names, "all") == names
