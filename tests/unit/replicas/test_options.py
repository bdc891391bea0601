"""The options of replicas, as the configuration gives them."""

from types import SimpleNamespace

import pytest

from starling.config.entry import config_of
from starling.config.parsing import OptionError
from starling.config.scheduling import parse_replicas


def config(entry):
    return SimpleNamespace(additional_config={"starling": entry})


def test_the_timeout_is_30_seconds_by_default():
    assert config_of(config({})).replicas.timeout == 30
    assert config_of(config({"replicas": {"timeout": 2.5}})).replicas.timeout == 2.5
    assert parse_replicas({"timeout": 3}).timeout == 3


@pytest.mark.parametrize("value", ["", "soon", 0, -1, float("nan"), float("inf"), True, None])
def test_a_value_that_is_no_time_is_refused(value):
    with pytest.raises(OptionError, match=f"replicas.timeout={value!r} is refused.*a number above 0"):
        config_of(config({"replicas": {"timeout": value}}))


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=r"replicas_limit='1' is refused: there is no such replicas option.*timeout"):
        parse_replicas({"limit": "1"}, prefix="replicas_")
