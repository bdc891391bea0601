"""Settings of hypothesis and of torch, and the order of tests in `pytest -n`.

Hypothesis draws the same examples in every run, without a time limit. `pytest --hypothesis-profile random` draws
others.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests import stateful
from tests.model_runners import HAS_V1, needs_v1
from tests.parts import split
from tests.signals import handlers

# All servers of the tests are on this machine. HTTP clients, and those of gRPC, would ask the user's proxy for them.
for scheme in ("http", "https", "all", "grpc"):
    for variable in (f"{scheme}_proxy", f"{scheme}_PROXY".upper()):
        os.environ.pop(variable, None)
# A terminal that the user's settings describe is none of the tests', which read what commands print.
for variable in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(variable, None)

UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **UNTIMED)
settings.register_profile("random", **UNTIMED)
settings.load_profile("fixed")


def pytest_addoption(parser):
    stateful.add_options(parser)
    parser.addoption(
        "--fuzz-minutes", type=float, default=0.0, help="run tests/e2e/test_fuzz.py for so long, with new examples"
    )

    parser.addoption(
        "--part", choices=("first", "rest", "all"), default="all", help="tests of make test, all others, or all"
    )


def pytest_collection_modifyitems(config, items):
    """Keep the tests of ``--part`` whose model runner the installed vLLM has."""
    kept = set(split((item.nodeid for item in items), config.getoption("part")))
    if not HAS_V1:
        kept -= {item.nodeid for item in items if needs_v1(getattr(item, "callspec", None))}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files with ``--dist loadfile``: those with servers in one worker, the others beside them."""
    from tests.scheduling import ServersBesideOthers

    return ServersBesideOthers(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Limit torch to one thread in this process, as engines and other workers of ``pytest -n`` use the other cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def same_signals():
    """Fail where the tests of a file leave a handler of signals, which the files after it would run with."""
    before = handlers()
    yield
    assert handlers() == before


@pytest.fixture(autouse=True)
def same_numbers():
    """Let torch draw the same numbers for a test, whatever ran before it in this process."""
    import torch

    torch.manual_seed(0)
