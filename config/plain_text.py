"""Text of a server as it may be printed and stored: without what steers a terminal, or changes the order of words."""

from __future__ import annotations

import re
from typing import Any

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
