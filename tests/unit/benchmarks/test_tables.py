"""The tables of the docs, and the rows of `starling doctor`, are those of the JSON files in benchmarks/results."""

from __future__ import annotations

import json

import pytest

from benchmarks import accuracy, anchors, approximations, lm_eval, retrieval
from benchmarks.repair import __main__ as repair
from benchmarks.report import RESULTS
from starling.evaluation.measured import read_measured

TABLES = [
    ("star-accuracy.md", "accuracy_*.json", accuracy.markdown),
    ("star-accuracy.md", "half_*.json", accuracy.markdown),
    ("star-accuracy.md", "approximations_*.json", approximations.markdown),
    ("star-accuracy.md", "anchors_*.json", anchors.markdown),
    ("star-accuracy.md", "retrieval.json", retrieval.markdown),
    ("eval.md", "lm_eval_*.json", lm_eval.markdown),
    ("documents.md", "repair_*.json", repair.markdown),
]


def stored(pattern: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    assert found
    return found


@pytest.mark.parametrize(("page", "pattern", "markdown"), TABLES, ids=[pattern for _, pattern, _ in TABLES])
def test_a_page_has_the_tables_of_the_results(page, pattern, markdown):
    text = (RESULTS.parents[1] / "docs" / page).read_text(encoding="utf-8")
    for result in stored(pattern):
        for table in markdown(result).split("\n\n"):
            assert table in text


def test_the_rows_of_doctor_are_those_of_the_results():
    assert accuracy.all_measured_rows() == [row.model_dump() for row in read_measured()]


def test_the_model_made_to_retrieve_finds_what_the_definition_of_star_attention_says():
    (result,) = stored("retrieval.json")
    assert all(row["as_expected"] == row["questions"] for row in result["rows"])
