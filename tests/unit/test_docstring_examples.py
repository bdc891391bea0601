"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.forks import ROOT

MODULES = [
    ".".join(("starling", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("scheduler", "attention_backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_plans_and_rows_have_examples():
    assert {"starling.scheduler.planning.plan", "starling.attention_backends.star.rows"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_an_example_is_what_the_code_gives(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 2 and not found.failed
