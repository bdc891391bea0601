"""Settings of hypothesis, and one thread of torch for each test process.

Hypothesis draws the same examples in every run, without a time limit. `pytest --hypothesis-profile random` draws
others.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests import stateful

settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")


def pytest_addoption(parser):
    stateful.add_options(parser)
    parser.addoption(
        "--fuzz-minutes", type=float, default=0.0, help="run tests/e2e/test_fuzz.py for so long, with new examples"
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Limit torch to one thread in this process, as engines and other workers of ``pytest -n`` use the other cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
