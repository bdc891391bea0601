"""Return one of several notes about the same topic exactly: the n-th one."""

from __future__ import annotations

from random import Random

from starling.lab.evaluation.tasks.base import Example, Task, depth_of
from starling.lab.evaluation.tasks.words import prose

TOPICS = ("bees", "bridges", "clocks", "glaciers", "lighthouses", "mushrooms", "tides", "violins")
ORDINALS = ("first", "second", "third", "fourth")
NUM_TOPICS, NUM_SENTENCES = 4, 2


def nth_note(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Ask for one of four notes of two sentences about four topics, among ``size`` others.

    Each sentence of the note is a reference. No other note has it.
    """
    topic, *others = rng.sample(TOPICS, NUM_TOPICS)
    topics = [topic] * len(ORDINALS) + [rng.choice(others) for _ in range(size)]
    rng.shuffle(topics)
    wanted = rng.randrange(len(ORDINALS))
    notes = [prose(rng, NUM_SENTENCES) for _ in topics]
    position = [i for i, of_note in enumerate(topics) if of_note == topic][wanted]
    others_text = {sentence for i, note in enumerate(notes) if i != position for sentence in note}
    while others_text & set(notes[position]) or len(set(notes[position])) < NUM_SENTENCES:
        notes[position] = prose(rng, NUM_SENTENCES)
    listed = "\n".join(f"Note about {name}: {' '.join(note)}" for name, note in zip(topics, notes, strict=True))
    ordinal = ORDINALS[wanted]
    text = (
        "The following notes have different topics. There can be several notes about one topic.\n\n"
        f"{listed}\n\n"
        f"Repeat the {ordinal} note about {topic}, word for word, and nothing else."
    )
    return Example(
        text=text,
        answer_prefix=f"Note about {topic}:",
        references=tuple(notes[position]),
        separator=" ",
        depth=depth_of(text, " ".join(notes[position])),
    )


TASKS = [Task("nth_note", nth_note, 1, 96, "the n-th of four notes about a topic, exactly", "Starling, after MRCR")]
