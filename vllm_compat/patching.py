"""Marking and changing of vLLM's code by Starling: at run time, once, without copying any of it."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

Original = Callable[..., Any]
T = TypeVar("T")


def wrap(owner: type | ModuleType, name: str) -> Callable[[T], T]:
    """Let calls of a function of a class or a module reach the decorated one, once; a classmethod stays one.

    The decorated function gets the original one, and then the arguments of the call.
    """

    def replace(function: Any) -> Any:
        current = inspect.getattr_static(owner, name)
        is_classmethod = isinstance(current, classmethod)
        original = current.__func__ if is_classmethod else current
        if getattr(original, "__starling__", False):
            return function

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        wrapped.__starling__ = True  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)
        return function

    return replace


def first_found(*names: str) -> Any:
    """Return the first of these objects that the installed vLLM has: releases have it at different places, or add it.

    names.py reads the calls, and lists those of the names that a vLLM has.

    Args:
        names: "module:attribute", or "module", as pkgutil.resolve_name takes them; the newest release's first.

    Raises:
        ImportError: vLLM has none of them.
    """
    for name in names:
        try:
            return pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"the installed vLLM has none of {', '.join(names)}")


def extends(*bases: type) -> Callable[[type[T]], type[T]]:
    """Say which vLLM classes a class extends whose bases are found at run time, or that is mixed into them.

    Changes nothing. names.py reads it, to list what the class overrides.
    """
    return lambda cls: cls


def touches(*names: str, since: str | None = None, before: str | None = None) -> Callable[[T], T]:
    """Say which attributes of vLLM's objects a function or a class reads or writes, as "module.Class.attribute".

    Several of one class are in braces: "module.Class.{first, second}".

    Changes nothing. names.py reads it, to list these attributes.

    Args:
        since: the first release that has the names, such as "0.34", where earlier supported ones do not.
        before: the first release that does not have them any more.
    """
    return lambda function: function
