"""How every section of options is read: unknown names, wrong types and wrong values get one kind of error."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

Switch = Literal["off", "on"]
M = TypeVar("M", bound=BaseModel)


class OptionError(ValueError):
    """An option that can't be used: its name, its value, the reason and what is allowed."""

    def __init__(self, name: str, value: object, reason: str, allowed: str) -> None:
        self.name = name
        self.value = value
        self.reason = reason
        self.allowed = allowed
        super().__init__(f"{name}={shown(value)} is refused: {reason}. Allowed: {allowed}.")


def shown(value: object) -> str:
    """A value in a message: of a list only the start, since a client may send any number of elements."""
    return reprlib.repr(value) if isinstance(value, (list, tuple)) else repr(value)


def parse_fields(
    model: type[M],
    values: Mapping[str, Any],
    kind: str,
    *,
    expected: Callable[[str], str],
    allowed: Callable[[str], str] | None = None,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
) -> M:
    """A model made of options.

    Args:
        values: option -> its value.
        kind: "star", "scheduler", ...: what the options are for, in messages.
        expected: field -> what a value must be, for "it must be ...".
        allowed: field -> what is allowed; by default what is expected.
        names: option -> the model's field; by default the options have the names of the fields.
        prefix: put before an option's name in messages.

    Raises:
        OptionError: an unknown name, or a value that the model does not take.
    """
    names = names or {field: field for field in model.model_fields}
    for name, value in values.items():
        if name not in names:
            raise OptionError(prefix + name, value, f"there is no such {kind} option", ", ".join(names))
    try:
        return model(**{names[name]: value for name, value in values.items()})
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        name = next(name for name in values if names[name] == field)
        value = values[name]
        reason = f"it must be {expected(field)}, not {shown(value)} ({type(value).__name__})"
        raise OptionError(prefix + name, value, reason, (allowed or expected)(field)) from None
