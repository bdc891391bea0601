"""The limit for replicas that keep silent, as the environment says it."""

import pytest

from scheduler.options import OptionError
from scheduler.silence import silence_seconds


def test_it_is_30_seconds_unless_said(monkeypatch):
    monkeypatch.delenv("STARLING_SILENCE_SECONDS", raising=False)
    assert silence_seconds() == 30
    monkeypatch.setenv("STARLING_SILENCE_SECONDS", "2.5")
    assert silence_seconds() == 2.5


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_what_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv("STARLING_SILENCE_SECONDS", text)
    with pytest.raises(OptionError, match=f"STARLING_SILENCE_SECONDS='{text}' is refused.*a number above 0; 30"):
        silence_seconds()
