"""RULER's retrieval tasks (arXiv 2404.06654, section 3.1): passcodes hidden in a text, eight variants.

Each variant has the haystack, the kinds of keys and values, and the numbers of keys, values and queries of RULER's
table of tasks. The words are Starling's.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from starling.lab.evaluation.tasks.base import Example, Task, depth_of, hide
from starling.lab.evaluation.tasks.words import distinct, noise, number, prose, pseudo_words, random_uuid

NEEDLE = "Remember: the passcode of {key} is {value}."


@dataclass(frozen=True)
class Needles:
    """One variant.

    Attributes:
        haystack: noise: the same sentences again and again; prose; needles: other passcodes.
        keys, values: words, numbers or UUIDs.
        num_keys: keys in the text, those that are asked for included; not with a haystack of needles.
        num_values: values of each key.
        num_queries: keys that are asked for.
    """

    haystack: Literal["noise", "prose", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __call__(self, rng: Random, size: int, ask: Random | None = None) -> Example:
        """Return an example with ``size`` sentences of haystack."""
        num_keys = self.num_keys + (size if self.haystack == "needles" else 0)
        keys = pseudo_words(rng, num_keys) if self.keys == "words" else distinct(rng, random_uuid, num_keys)
        make_value = number if self.values == "numbers" else random_uuid
        values = distinct(rng, make_value, num_keys * self.num_values)
        pairs = [(key, values[i * self.num_values : (i + 1) * self.num_values]) for i, key in enumerate(keys)]
        needles = [NEEDLE.format(key=key, value=value) for key, of_key in pairs for value in of_key]
        rng.shuffle(needles)
        if self.haystack == "needles":
            context = " ".join(needles)
        else:
            sentences = noise(size) if self.haystack == "noise" else prose(rng, size)
            context = hide(rng, sentences, needles)
        asked = (ask or rng).sample(pairs, self.num_queries)
        names = join([key for key, _ in asked])
        many = self.num_queries * self.num_values > 1
        codes = "passcodes" if many else "passcode"
        text = (
            "Passcodes are hidden in the following text. Remember them: a question about them follows the text.\n\n"
            f"{context}\n\n"
            f"According to the text, what {'are all' if many else 'is the'} {codes} of {names}?"
        )
        key, (value, *_) = asked[0]
        return Example(
            text=text,
            answer_prefix=f"According to the text, the {codes} of {names} {'are' if many else 'is'}",
            references=tuple(value for _, of_key in asked for value in of_key),
            depth=None if many else depth_of(text, NEEDLE.format(key=key, value=value)),
        )


def join(names: list[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


VARIANTS: dict[str, tuple[Needles, str]] = {
    "niah_single_1": (Needles("noise"), "one number in repeated noise"),
    "niah_single_2": (Needles("prose"), "one number in prose"),
    "niah_single_3": (Needles("prose", values="uuids"), "one UUID in prose"),
    "niah_multikey_1": (Needles("prose", num_keys=4), "one of four numbers in prose"),
    "niah_multikey_2": (Needles("needles"), "one of many numbers; the text holds nothing else"),
    "niah_multikey_3": (Needles("needles", keys="uuids", values="uuids"), "one of many UUIDs, named by a UUID"),
    "niah_multivalue": (Needles("prose", num_values=4), "all four numbers of one key"),
    "niah_multiquery": (Needles("prose", num_keys=4, num_queries=4), "the numbers of four keys"),
}
TASKS = [Task(name, make, 1, 128, measures, "RULER") for name, (make, measures) in VARIANTS.items()]
