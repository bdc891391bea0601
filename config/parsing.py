"""Reading of the sections of options, with one kind of error, and texts that can be printed safely."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

M = TypeVar("M", bound=BaseModel)

NUMBER = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?([kKmM]?)")
SHARE_TEXT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(%?)")
MULTIPLES = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}


def read_number(value: Any) -> Any:
    """Return the number of a text: "256", or "16k" and "16K" with vLLM's multiples, 1,000 and 1,024.

    Any other value is returned as it is.
    """
    found = NUMBER.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 32 else None
    if found is None:
        return value
    whole, decimals, unit = found[1], found[2] or "", MULTIPLES[found[3]]
    scaled = int(whole + decimals) * unit
    return value if scaled % 10 ** len(decimals) else scaled // 10 ** len(decimals)


def read_switch(value: Any) -> Any:
    """Return `on` or `off` for a JSON boolean, of which vLLM makes 1 or 0, and words in any case.

    Any other value is returned as it is.
    """
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return "on" if value else "off"
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return "on" if value.strip().lower() == "true" else "off"
    return read_word(value)


def read_word(value: Any) -> Any:
    """Return a word in lower case; any other value is returned as it is."""
    return value.strip().lower() if isinstance(value, str) else value


def read_share(value: Any) -> Any:
    """Return the number of a text, "0.1" or "10%"; any other value is returned as it is."""
    found = SHARE_TEXT.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 32 else None
    return value if found is None else float(found[1]) / (100 if found[2] else 1)


Switch = Annotated[Literal["off", "on"], BeforeValidator(read_switch)]
Tokens = Annotated[int, BeforeValidator(read_number), Field(ge=0)]
Count = Annotated[int, BeforeValidator(read_number), Field(ge=1)]
Share = Annotated[float, BeforeValidator(read_share), Field(ge=0, le=1, allow_inf_nan=False)]


class OptionError(ValueError):
    """An option that can't be used: its name, its value, the reason and what is allowed."""

    def __init__(self, name: str, value: object, reason: str, allowed: str) -> None:
        self.name = name
        self.value = value
        self.reason = reason
        self.allowed = allowed
        super().__init__(f"{name}={shown(value)} is refused: {reason}. Allowed: {allowed}.")


MAX_SHOWN = 216  # characters
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = MAX_SHOWN
SHOWN.maxdict = 16


def shown(value: object) -> str:
    """Return a value for a message, in MAX_SHOWN characters at most: a list's start, a long text's ends."""
    text = SHOWN.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2 - 3]}...{text[-MAX_SHOWN // 2 :]}"


def meant(name: str, names: Iterable[str], *, misspelled: bool = True) -> str:
    """Return ", did you mean ..." where one of ``names`` has all words of a name, or is nearly the name; else nothing.

    Args:
        misspelled: True if the name may be a misspelled one.
    """
    words, names = set(re.split("[-_]", name[:64])), list(names)
    close = [each for each in names if words <= set(re.split("[-_]", each))]
    if misspelled and not close:
        close = difflib.get_close_matches(name[:64], names, 1)
    return f", did you mean {close[0]}" if close else ""


def words_of(annotation: Any) -> list[str]:
    """Return the words that a type allows by a Literal."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for part in get_args(annotation) for word in words_of(part)]


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
    """Make a model of options.

    Args:
        values: option -> its value.
        kind: name of the kind of options in messages: "star", "scheduler", ...
        expected: field -> what a value must be, for "it must be ...".
        allowed: field -> what is allowed; by default what is expected.
        names: option -> the model's field; by default the options have the names of the fields.
        prefix: text before an option's name in messages.

    Raises:
        OptionError: an unknown name, or a value that the model does not take.
    """
    names = names or {field: field for field in model.model_fields}
    for name, value in values.items():
        if name not in names:
            reason = f"there is no such {kind} option{meant(name, names)}"
            raise OptionError(prefix + name, value, reason, ", ".join(names))
    made = model.__new__(model)
    try:  # a model's own __init__ may name its fields in errors, and options have other names
        BaseModel.__init__(made, **{names[name]: value for name, value in values.items()})
        return made
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        name = next(name for name in values if names[name] == field)
        value = values[name]
        near = meant(value, words_of(model.model_fields[field].annotation)) if isinstance(value, str) else ""
        reason = f"it must be {expected(field)}, not {shown(value)} ({type(value).__name__}){near}"
        raise OptionError(prefix + name, value, reason, (allowed or expected)(field)) from None


SEQUENCE = re.compile(
    # A string for the terminal, such as its title, up to its end.
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, movements of the cursor
    r"|\x1b[ -/]*[0-~]?"
)
"""The escape sequences of ECMA-48, whole, so that nothing of them is left as text."""
REMOVED = (
    *(range(0x09), range(0x0B, 0x20), range(0x7F, 0xA0)),  # C0 without tab and line feed; DEL and C1
    *(range(0x2028, 0x202F), range(0x2066, 0x206A)),  # separators of lines, changes of the direction of words
    range(0xD800, 0xE000),  # halves of characters, which no file in UTF-8 holds
)
TABLE = {code: " " if chr(code).isspace() else "" for codes in REMOVED for code in codes}


def plain(text: str) -> str:
    """Return a text without escape sequences, controls, lone surrogates and changes of direction.

    Line feeds and tabs stay. Other controls that are white space become a space.
    """
    return SEQUENCE.sub("", text.replace("\r\n", "\n")).translate(TABLE)


def plain_json(value: Any) -> Any:
    """Make each text in a value of JSON plain, names too (raises RecursionError for one that is too deep)."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [plain_json(item) for item in value]
    if isinstance(value, dict):
        return {plain(name): plain_json(item) for name, item in value.items()}
    return value
