"""RULER's aggregation tasks (arXiv 2404.06654, section 3.3), which ask for the most frequent words."""

from __future__ import annotations

from random import Random

from starling.lab.evaluation.tasks.base import Example, Task
from starling.lab.evaluation.tasks.words import pseudo_words

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


TASKS = [
    Task("cwe", common_words, 1, 120, "the ten most common words of a list", "RULER"),
    Task("fwe", frequent_words, 60, 50, "the three most frequent words of a text", "RULER"),
]
