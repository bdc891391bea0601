"""Functions of vLLM are replaced once."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from starling.vllm_compat.patching import extends, first_found, touches, wrap


def test_wrapping_twice_wraps_once():
    class Owner:
        def method(self):
            return ["original"]

        @classmethod
        def maker(cls, value):
            return [cls.__name__, value]

    for _ in range(2):

        @wrap(Owner, "method")
        @wrap(Owner, "maker")
        def wrapped(original, *args):
            return [*original(*args), "wrapped"]

    assert Owner().method() == ["original", "wrapped"]
    assert Owner.maker(3) == ["Owner", 3, "wrapped"]
    assert Owner.method.__name__ == "method"


def test_a_function_of_a_module_is_replaced():
    module = ModuleType("module")
    module.double = lambda x: 2 * x
    wrap(module, "double")(lambda original, x: original(x) + 1)
    assert module.double(3) == 7


def test_the_first_place_that_exists_is_taken():
    assert first_found("json.nowhere:loads", "json:nothing", "json:loads", "json:dumps") is json.loads
    assert first_found("json.nowhere", "json") is json
    with pytest.raises(ImportError, match=r"has none of json\.nowhere, json:nothing"):
        first_found("json.nowhere", "json:nothing")


def test_marks_change_nothing():
    def function() -> None: ...

    assert touches("vllm.a.B.c")(function) is function
    assert extends(int)(ModuleType) is ModuleType
