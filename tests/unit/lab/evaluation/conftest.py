"""Fixtures of the tests of commands."""

import pytest

from starling.lab.evaluation import client as client_module


@pytest.fixture
def surroundings(monkeypatch):
    """A wide terminal, no keys in the environment, and no pauses between attempts."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
