"""Tasks with right answers, in texts of any length: pure functions of a random generator and a size.

The words are Starling's, the rules those of RULER, MRCR, NoLiMa and BABILong, as each task says.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

from starling.lab.evaluation.words import distinct, noise, number, prose, pseudo_words, random_uuid

Match = Literal["all", "any"]
"""Score of an output: the share of references that it contains, or whether it contains one of them."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task.

    Attributes:
        text: the context, and the question behind it.
        answer_prefix: the words with which the answer begins; they are given to the model.
        references: the strings that a right answer contains.
        separator: text between them in a right answer.
        depth: place in ``text`` where the fact begins that the answer needs (``depth_of``), or None where there are
            several facts, or the whole text is needed.
    """

    text: str
    answer_prefix: str
    references: tuple[str, ...]
    separator: str = ", "
    depth: float | None = None

    @property
    def answer(self) -> str:
        """Return the right answer as the model would continue ``answer_prefix``."""
        return " " + self.separator.join(self.references)


class MakeExample(Protocol):
    """Makes an example. A larger size gives a longer text.

    The same states of the generators and the same size give the same example. ``ask`` chooses the question where a text
    has several: with another state, the question is another one about the same text. With None, ``rng`` chooses it.
    """

    def __call__(self, rng: Random, size: int, ask: Random | None = None) -> Example: ...


@dataclass(frozen=True)
class Task:
    """A family of prompts of any length.

    Attributes:
        name: name for --tasks.
        make: function that makes an example.
        least: the smallest size.
        max_tokens: maximum tokens of an answer.
        measures: line that says what the task measures.
        source: source of the definition that it follows.
    """

    name: str
    make: MakeExample
    least: int
    max_tokens: int
    measures: str
    source: str


def depth_of(text: str, fact: str) -> float:
    """Return where a fact begins that a text has once, in characters: 0 at the beginning, towards 1 at the end."""
    return text.index(fact) / len(text)


def hide(rng: Random, sentences: Sequence[str], needles: Sequence[str]) -> str:
    """Return the sentences as one text, with each needle at a random place between them, in the needles' order."""
    places = sorted(rng.randint(0, len(sentences)) for _ in needles)
    pieces: list[str] = []
    start = 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*sentences[start:place], needle]
        start = place
    return " ".join([*pieces, *sentences[start:]])


# RULER's retrieval tasks (arXiv 2404.06654, section 3.1): passcodes hidden in a text, eight variants. Each has the
# haystack, the kinds of keys and values, and the numbers of keys, values and queries of RULER's table of tasks.
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


# RULER's aggregation tasks (arXiv 2404.06654, section 3.3).
NUM_COMMON, TIMES_COMMON, TIMES_OTHER = 10, 30, 3
NUM_FREQUENT, EXPONENT, FILLER = 3, 2, "..."
ZETA = 1.6449340668482264  # the sum of 1 / k^2 over all k


def common_words(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Return ten words that occur 30 times each, among ``size`` words that occur 3 times each."""
    words = pseudo_words(rng, NUM_COMMON + size)
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    listed = common * TIMES_COMMON + others * TIMES_OTHER
    rng.shuffle(listed)
    return Example(
        text=(
            "The following list has words, some of which are repeated much more often than others.\n\n"
            f"{', '.join(listed)}\n\n"
            f"Which {NUM_COMMON} words are the most common in the list?"
        ),
        answer_prefix=f"The {NUM_COMMON} most common words in the list are:",
        references=tuple(common),
    )


def frequent_words(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Ask for the three most frequent of the pseudo-words in ``size`` words, with frequencies of a zeta distribution.

    The word of rank k has the share 1 / (k^2 zeta(2)). The first rank is a filler, which the question excludes.
    """
    counts: list[int] = []
    while len(counts) < NUM_FREQUENT + 1 or sum(counts) < size:
        rank = len(counts) + 1
        counts.append(max(1, round(size / (ZETA * rank**EXPONENT))))
    words = pseudo_words(rng, len(counts) - 1)
    text = [word for word, count in zip([FILLER, *words], counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Example(
        text=(
            "The following text is in an unknown language. Count its words, and ignore the dots.\n\n"
            f"{' '.join(text)}\n\n"
            f"Which {NUM_FREQUENT} words occur most often in the text?"
        ),
        answer_prefix=f"The {NUM_FREQUENT} words that occur most often are:",
        references=tuple(words[:NUM_FREQUENT]),
    )


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


# Needles that share no word with the question, as NoLiMa's (arXiv 2502.05167). The associations are Starling's own.
NAMES = ("Arvid", "Bettina", "Cosmo", "Delia", "Emre", "Fenja", "Goran", "Hanna", "Ilse", "Jonas", "Karim", "Livia")

CITIES = (
    ("lives beside the Eiffel Tower", "Paris"),
    ("lives beside the Colosseum", "Rome"),
    ("lives beside the Brandenburg Gate", "Berlin"),
    ("has a flat with a view of Big Ben", "London"),
    ("works next to the Sagrada Familia", "Barcelona"),
    ("sells ice cream below the Acropolis", "Athens"),
    ("paints the Hagia Sophia every spring", "Istanbul"),
    ("guards the gates of the Kremlin", "Moscow"),
    ("cleans the windows of the Opera House on Bennelong Point", "Sydney"),
    ("rows a gondola past the Doge's Palace", "Venice"),
    ("studies beneath the Leaning Tower", "Pisa"),
    ("takes the ferry to the Statue of Liberty to work", "New York"),
    ("lives between the Rijksmuseum and a canal", "Amsterdam"),
    ("watches the Little Mermaid from the kitchen", "Copenhagen"),
    ("feeds the pigeons on Charles Bridge", "Prague"),
    ("runs a kiosk below Sugarloaf Mountain", "Rio de Janeiro"),
    ("photographs the Golden Gate Bridge in the fog", "San Francisco"),
    ("tends the lawns around the Taj Mahal", "Agra"),
    ("lives in the shadow of the Burj Khalifa", "Dubai"),
    ("has breakfast opposite the Hofburg and the Prater wheel", "Vienna"),
    ("sells tickets for the Guinness Storehouse", "Dublin"),
    ("polishes the brass of the Atomium", "Brussels"),
    ("crosses the Chain Bridge over the Danube each morning", "Budapest"),
    ("works at the foot of Table Mountain", "Cape Town"),
)
COUNTRIES = (
    ("camps at the foot of Mount Fuji", "Japan"),
    ("leads tours to the pyramids of Giza", "Egypt"),
    ("restores walls at Machu Picchu", "Peru"),
    ("bathes in the geysers near Reykjavik", "Iceland"),
    ("repairs the Great Wall", "China"),
    ("shears sheep near Wellington", "New Zealand"),
    ("grew up between the fjords of Bergen", "Norway"),
    ("keeps bees on the slopes of the Matterhorn", "Switzerland"),
    ("watches kangaroos near Alice Springs", "Australia"),
    ("cooks in a cabin near Lake Louise and Banff", "Canada"),
    ("guides visitors through the temples of Angkor Wat", "Cambodia"),
    ("rides past the carved tombs of Petra", "Jordan"),
)
DIETS = (
    ("never eats anything that comes from an animal", "vegan"),
    ("gets a rash from milk, cheese and butter", "allergic to dairy"),
    ("falls ill from bread, pasta and beer made of wheat", "sensitive to gluten"),
    ("must not come near peanuts or walnuts", "allergic to nuts"),
)
SKILLS = (
    ("checks the teeth of half the village", "a dentist"),
    ("argues before judges for a living", "a lawyer"),
    ("draws the plans from which houses are built", "an architect"),
    ("flies an Airbus twice a week", "a pilot"),
    ("looks at galaxies through a telescope all night", "an astronomer"),
    ("grinds lenses and fits glasses", "an optician"),
    ("shoes horses at a forge", "a blacksmith"),
    ("treats sick dogs and cats", "a vet"),
)

QUESTIONS = (
    ("Who of the people in the text has been to {answer}?", CITIES + COUNTRIES),
    ("Who of the people in the text is {answer}?", DIETS + SKILLS),
)
ASSOCIATIONS = [(needle, answer, question) for question, pairs in QUESTIONS for needle, answer in pairs]


def association(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Ask who has been to Paris: in ``size`` sentences of prose, someone lives beside the Eiffel Tower."""
    needle, answer, question = rng.choice(ASSOCIATIONS)
    name = rng.choice(NAMES)
    fact = f"By the way, {name} {needle}."
    text = (
        "The following text mentions a person by name.\n\n"
        f"{hide(rng, prose(rng, size), [fact])}\n\n"
        f"{question.format(answer=answer)} Answer with the name."
    )
    return Example(
        text=text,
        answer_prefix="The name is",
        references=(name,),
        depth=depth_of(text, fact),
    )


FUNCTIONS_OF_A_FILE = 4
MODES = ("fast", "safe", "test", "batch", "local", "remote")
FUNCTION = '''def {name}(mode):
    """Return the {noun} limit of a mode."""
    if mode == "{first}":
        return {one}
    if mode == "{second}":
        return {two}
    raise ValueError(mode)
'''
NOUNS = ("queue", "retry", "cache", "upload", "session", "token", "buffer", "worker")


def function_value(rng: Random, size: int, ask: Random | None = None) -> Example:
    """Return Python files with ``size`` functions; asks what one of them returns for one argument."""
    names = pseudo_words(rng, size)
    values = distinct(rng, number, 2 * size)
    modes = [rng.sample(MODES, 2) for _ in names]
    functions = [
        FUNCTION.format(
            name=f"limit_{name}",
            noun=rng.choice(NOUNS),
            first=modes[i][0],
            second=modes[i][1],
            one=values[2 * i],
            two=values[2 * i + 1],
        )
        for i, name in enumerate(names)
    ]
    groups = [functions[i : i + FUNCTIONS_OF_A_FILE] for i in range(0, size, FUNCTIONS_OF_A_FILE)]
    files = [f"# file: limits/part_{i}.py\n\n" + "\n\n".join(group) for i, group in enumerate(groups)]
    chooses = ask or rng
    asked, branch = chooses.randrange(size), chooses.randrange(2)
    call = f'limit_{names[asked]}("{modes[asked][branch]}")'
    text = (
        "The following files are part of a Python project.\n\n" + "\n\n".join(files) + f"\n\nWhat does `{call}` return?"
    )
    return Example(
        text=text,
        answer_prefix=f"`{call}` returns",
        references=(values[2 * asked + branch],),
        depth=depth_of(text, functions[asked]),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Task(name, make, 1, 128, measures, "RULER") for name, (make, measures) in VARIANTS.items()),
        Task("vt", variables, 1, 30, "all variables of a chain of assignments", "RULER"),
        Task("moves", moves, 1, 8, "two facts about a person and a thing, far apart", "Starling, after BABILong"),
        Task("cwe", common_words, 1, 120, "the ten most common words of a list", "RULER"),
        Task("fwe", frequent_words, 60, 50, "the three most frequent words of a text", "RULER"),
        Task("nth_note", nth_note, 1, 96, "the n-th of four notes about a topic, exactly", "Starling, after MRCR"),
        Task(
            "association",
            association,
            1,
            12,
            "a sentence that shares no word with the question, by common knowledge",
            "Starling, after NoLiMa",
        ),
        Task("code", function_value, 1, 24, "what one of many functions returns for an argument", "Starling"),
    )
}
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(TASKS),
    "ruler": tuple(name for name, task in TASKS.items() if task.source == "RULER"),
}


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, in the order of TASKS.

    Args:
        names: a task's name; the start of names up to an underscore, such as niah or niah_multikey; or a group.

    Raises:
        ValueError: a name that stands for no task.
    """
    chosen: set[str] = set()
    for name in names:
        found = GROUPS.get(name) or [task for task in TASKS if task == name or task.startswith(f"{name}_")]
        if not found:
            raise ValueError(
                f"tasks={name!r} is refused: there is no such task. Allowed: {', '.join((*GROUPS, *TASKS))}, or the "
                "start of names up to an underscore, such as niah."
            )
        chosen.update(found)
    return [task for name, task in TASKS.items() if name in chosen]
