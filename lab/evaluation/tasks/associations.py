"""A needle that shares no word with the question: only common knowledge connects them.

NoLiMa (arXiv 2502.05167) introduced such needles. The associations are Starling's own.
"""

from __future__ import annotations

from random import Random

from starling.lab.evaluation.tasks.base import Example, Task, depth_of, hide
from starling.lab.evaluation.tasks.words import prose

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


TASKS = [
    Task(
        "association",
        association,
        1,
        12,
        "a sentence that shares no word with the question, by common knowledge",
        "Starling, after NoLiMa",
    )
]
