"""NIXL agents of these tests use the loopback device alone. No limit of time passes on a slow machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from starling.features.replicas import remote_attention_client
from starling.features.replicas.network import DEVICES_ENV


@pytest.fixture(autouse=True, scope="session")
def loopback_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICES_ENV, "lo")
        yield


@pytest.fixture(autouse=True)
def patience(monkeypatch) -> None:
    monkeypatch.setattr(remote_attention_client, "RESPONSE_SECONDS", 300.0)
