"""The tables of the docs are those of the JSON files in benchmarks/results."""

from __future__ import annotations

import json

from benchmarks import accuracy, approximations, lm_eval
from benchmarks.report import RESULTS

PAGE = (RESULTS.parents[1] / "docs" / "star-accuracy.md").read_text(encoding="utf-8")


def stored(pattern: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    assert found
    return found


def test_the_page_has_the_tables_of_the_results():
    assert accuracy.markdown(stored("accuracy_*.json")) in PAGE
    assert lm_eval.markdown(stored("lm_eval_*.json")) in PAGE


def test_the_page_has_the_tables_of_other_approximations():
    results = stored("approximations_*.json")
    assert len(results) == 4 and all(approximations.markdown(result) in PAGE for result in results)
    text = "answers {} % and {} % of the questions right at 2,048 tokens, {} % and {} % at 8,192"
    results.sort(key=lambda result: (result["tokens"], result["model"] != "smollm2-135m-instruct"))
    right = [round(result["rows"][approximations.DENSE]["right"]) for result in results]
    assert text.format(*right) in " ".join(PAGE.split())


def test_the_model_made_to_retrieve_finds_what_the_definition_of_star_attention_says():
    (result,) = stored("retrieval.json")
    assert all(row["as_expected"] == row["questions"] == 40 for row in result["rows"])
    default, *paper = (row["right"] for row in result["rows"] if row["plan"] != "dense")
    text = "{} right answers with the default plan, {}, {} and {} with A = B at n/4, n/8 and n/16."
    assert text.format(default, *paper) in " ".join(PAGE.split())
