"""Fixtures of the tests of the Python client."""

import pytest


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request):
    return request.param
