"""Sets of options for three kinds of work: `--preset long`, `rag` or `agents`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starling.config.parsing import OptionError, meant

PRESET = "preset"


@dataclass(frozen=True)
class Preset:
    """A set of options; a user's other options replace single ones.

    Attributes:
        meaning: description for the help.
        entry: values of the `starling` entry.
        cpu_page: vLLM's --block-size on CPUs, where its default of 128 tokens is too large, or None for vLLM's default.
    """

    meaning: str
    entry: Mapping[str, Any]
    cpu_page: int | None = None


PRESETS = {
    "long": Preset(
        "long prompts of any kind: star blocks from 16,384 tokens on",
        {"star": "auto", "star_min_tokens": 16384},
    ),
    "rag": Preset(
        "prompts of many documents, each a message of a chat: their cached KV is used in any order",
        {"star": "auto", "star_min_tokens": 1024, "star_segments": "auto"},
        cpu_page=32,
    ),
    "agents": Preset(
        "long sessions whose files and tool results change, beside short chats: cached messages are used behind an "
        "edit, and long prompts leave room for others",
        {"star": "auto", "star_min_tokens": 4096, "star_segments": "auto"},
        cpu_page=32,
    ),
}


def preset_of(entry: Mapping[str, Any], name: str) -> Preset | None:
    """Return the preset that an entry names, or None if it names none.

    Args:
        name: name of the option, for messages.

    Raises:
        OptionError: there is no such preset.
    """
    value = entry.get(PRESET)
    if value is None:
        return None
    if not isinstance(value, str) or value not in PRESETS:
        hint = meant(value, PRESETS) if isinstance(value, str) else ""
        raise OptionError(name, value, f"there is no such preset{hint}", ", ".join(PRESETS))
    return PRESETS[value]


def with_preset(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an entry with the options of its preset below its own (raises OptionError: there is no such preset)."""
    preset = preset_of(entry, name)
    own = {key: value for key, value in entry.items() if key != PRESET}
    return {**({} if preset is None else preset.entry), **own}
