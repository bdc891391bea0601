"""RULER's scores (arXiv 2404.06654, section 3), of one output."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from starling.lab.evaluation.tasks.base import Match


def score(output: str, references: Sequence[str], match: Match) -> float:
    """How right an output is, from 0 to 1. Case and white space do not matter.

    Args:
        references: at least one.
        match: ``all`` (RULER's string_match_all): the share of the references that the output contains; ``any``
            (string_match_part): 1 if it contains one of them.
    """
    text = normalise(output)
    found = [normalise(reference) in text for reference in references]
    return sum(found) / len(found) if match == "all" else float(any(found))


def normalise(text: str) -> str:
    """The text in lower case, composed (NFC), with one space for each run of white space."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())
