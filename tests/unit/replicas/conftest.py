"""NIXL agents of these tests use the loopback device alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from replicas.network import DEVICES_ENV


@pytest.fixture(autouse=True, scope="session")
def loopback_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICES_ENV, "lo")
        yield
