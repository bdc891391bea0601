"""Tasks that follow something through a text: RULER's variables, and things that people carry from place to place."""

from __future__ import annotations

import string
from random import Random

from starling.lab.evaluation.tasks.base import Example, Task, hide
from starling.lab.evaluation.tasks.words import distinct, noise, prose

NUM_HOPS = 4  # of RULER's variable tracking
PEOPLE = ("Ines", "Jarek", "Lotte", "Milan", "Nadia", "Oskar", "Petra", "Ruben")
ROOMS = ("attic", "bakery", "cellar", "chapel", "kitchen", "stable", "studio", "tower")
OBJECTS = ("compass", "kettle", "lantern", "ledger", "mirror", "umbrella")


def variables(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Return RULER's variable tracking with one chain of four hops, in ``size`` sentences of noise."""
    names = distinct(rng, lambda rng: "".join(rng.choices(string.ascii_uppercase, k=5)), NUM_HOPS + 1)
    value = str(rng.randint(10_000, 99_999))
    values = [value, *(f"VAR {name}" for name in names[:-1])]
    needles = [f"VAR {name} = {of_name}." for name, of_name in zip(names, values, strict=True)]
    question = f"Which variables have the value {value}, directly or through another variable? There are {len(names)}."
    prefix, references = f"The variables that have the value {value} are:", tuple(names)
    if ask is not None:
        asked = ask.choice(names)
        question, prefix, references = f"What is the value of {asked}?", f"The value of {asked} is", (value,)
    return Example(
        text=(
            "The following text assigns values to variables. Keep track of them.\n\n"
            f"{hide(rng, noise(size), needles)}\n\n"
            f"{question}"
        ),
        answer_prefix=prefix,
        references=references,
    )


def moves(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Ask for the place of an object, which one person carries from room to room, in ``size`` sentences of prose.

    The answer needs two facts: who has the object, and where this person went last. Others move too.
    """
    objects, people, rooms = rng.sample(OBJECTS, 2), rng.sample(PEOPLE, 4), rng.sample(ROOMS, 6)
    thing, carrier = objects[0], people[0]
    others = [
        f"{people[1]} picked up the {objects[1]}.",
        *(f"{name} went to the {rng.choice(rooms[1:])}." for name in people[1:] for _ in range(2)),
    ]
    rng.shuffle(others)
    story = [
        f"{carrier} went to the {rooms[1]}.",
        f"{carrier} picked up the {thing}.",
        f"{carrier} went to the {rooms[2]}.",
        f"{carrier} went to the {rooms[0]}.",
    ]
    for sentence in others:
        story.insert(rng.randint(0, len(story)), sentence)
    room = rooms[0]
    if ask is not None and ask.randrange(2):
        thing, start = objects[1], f"{people[1]} went to the "
        room = [sentence.removeprefix(start) for sentence in story if sentence.startswith(start)][-1].removesuffix(".")
    return Example(
        text=(
            "In the following text, people move between rooms and carry things with them.\n\n"
            f"{hide(rng, prose(rng, size), story)}\n\n"
            f"Where is the {thing} at the end of the text? Name the room."
        ),
        answer_prefix=f"At the end of the text, the {thing} is in the",
        references=(room,),
    )


TASKS = [
    Task("vt", variables, 1, 30, "all variables of a chain of assignments", "RULER"),
    Task("moves", moves, 1, 8, "two facts about a person and a thing, far apart", "Starling, after BABILong"),
]
