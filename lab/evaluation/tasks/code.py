"""The task of `starling eval` that asks about one function of a generated code repository."""

from __future__ import annotations

from random import Random

from starling.lab.evaluation.tasks.base import Example, Task, depth_of
from starling.lab.evaluation.tasks.words import distinct, number, pseudo_words

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


TASKS = [Task("code", function_value, 1, 24, "what one of many functions returns for an argument", "Starling")]
