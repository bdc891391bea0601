"""Pseudo-words, numbers, UUIDs and prose for the tasks, all from a random generator."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from itertools import pairwise
from random import Random

ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "l", "m", "n", "r", "s")

NOISE = ("The road is dry.", "The lamp is lit.", "The door stands open.", "We walk on.", "Then it is quiet again.")

ADJECTIVES = (
    *("patient", "early", "narrow", "quiet", "public", "modest", "foreign", "heavy", "ordinary", "anxious"),
    *("useful", "slow", "generous", "plain", "remote", "careful", "broken", "familiar", "young", "silent"),
)
PEOPLE = (
    *("teacher", "merchant", "gardener", "traveller", "clerk", "carpenter", "musician", "neighbour", "captain"),
    *("farmer", "librarian", "painter", "doctor", "miller", "weaver", "printer"),
)
THINGS = (
    *("letter", "bridge", "garden", "argument", "harvest", "machine", "question", "promise", "window", "winter"),
    *("journey", "custom", "market", "habit", "river", "workshop", "memory", "story", "mistake", "plan"),
)
VERBS = (
    *("described", "remembered", "avoided", "repaired", "admired", "questioned", "postponed", "explained"),
    *("forgot", "praised", "examined", "changed"),
)
PLACES = (
    *("behind the station", "in the old town", "near the harbour", "on the hill", "beyond the fields"),
    *("at the edge of the forest", "under the arches", "across the square"),
)
SENTENCES = (
    "The {adjective} {person} {verb} the {thing} {place}.",
    "Nobody {verb} the {thing} as often as the {person} did.",
    "It was a {adjective} {thing}, and the {person} knew it.",
    "When the {thing} came to an end, the {person} {verb} another {thing2}.",
    "A {adjective} {thing} is worth more than a {adjective2} {thing2}.",
    "Some say that every {thing} begins with a {adjective} {thing2}.",
    "In those years the {person} {verb} each {thing} {place}.",
    "What the {person} {verb} was not the {thing} but the {thing2}.",
    "{place_capital} there was a {adjective} {thing}, which the {person} {verb}.",
    "Whoever has seen a {adjective} {thing} will not be surprised by a {thing2}.",
    "The {person} and the {person2} disagreed about the {thing}.",
    "After a {adjective} {thing}, even a {person} needs rest.",
)


def pseudo_word(rng: Random) -> str:
    """Return a word of two or three syllables that means nothing."""
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))
    return "".join(syllables) + rng.choice(CODAS)


def pseudo_words(rng: Random, count: int) -> list[str]:
    """Return different pseudo-words, of which none contains another one."""
    words: dict[str, None] = {}
    parts: set[str] = set()
    while len(words) < count:
        word = pseudo_word(rng)
        inside = {word[i:j] for i in range(len(word)) for j in range(i + 4, len(word) + 1)}
        if len(word) >= 4 and word not in parts and not inside & words.keys():
            words[word] = None
            parts |= inside
    return list(words)


def number(rng: Random) -> str:
    """Return a number of seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: Random) -> str:
    """Return a version-4 UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(rng: Random, make: Callable[[Random], str], count: int) -> list[str]:
    """Return different values of ``make(rng)``."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[make(rng)] = None
    return list(values)


def noise(count: int) -> list[str]:
    """Return RULER's simplest haystack: the same few sentences again and again."""
    return [NOISE[i % len(NOISE)] for i in range(count)]


def prose(rng: Random, count: int) -> list[str]:
    """Return sentences of a small grammar that read like an essay without a point. They have no digits and no names."""

    def sentence() -> str:
        first, second = rng.sample(THINGS, 2)
        person, other = rng.sample(PEOPLE, 2)
        one, two = rng.sample(ADJECTIVES, 2)
        place = rng.choice(PLACES)
        text = rng.choice(SENTENCES).format(
            adjective=one,
            adjective2=two,
            person=person,
            person2=other,
            thing=first,
            thing2=second,
            verb=rng.choice(VERBS),
            place=place,
            place_capital=place.capitalize(),
        )
        return with_articles(text)

    return [sentence() for _ in range(count)]


def with_articles(text: str) -> str:
    """Return the text with "an" for "a" before a vowel."""
    words = text.split(" ")
    for i, (word, following) in enumerate(pairwise(words)):
        if word in ("a", "A") and following[0] in "aeio":
            words[i] = word + "n"
    return " ".join(words)
