"""What a stored result says of where its figures come from."""

from __future__ import annotations

import json

import pytest

from benchmarks import report


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a row on a day, and returns the stored result."""
    monkeypatch.setattr(report, "OUT", tmp_path)

    def write(day: str, tokens: int, seconds: float) -> dict:
        monkeypatch.setattr(report, "origin", lambda: {"machine": {"cores": 2}, "date": day})
        _, path = report.write_row("result", "rows", {"tokens": tokens, "seconds": seconds}, ("tokens",))
        return json.loads(path.read_text())

    return write


def test_a_row_keeps_its_origin_when_another_one_is_written(write):
    write("2026-01-01", 2, 1.0)
    result = write("2026-01-02", 1, 2.0)
    assert result["date"] == "2026-01-02"
    assert [(row["tokens"], row["date"]) for row in result["rows"]] == [(1, "2026-01-02"), (2, "2026-01-01")]


def test_a_row_written_again_has_its_new_origin(write):
    write("2026-01-01", 2, 1.0)
    (row,) = write("2026-01-02", 2, 3.0)["rows"]
    assert row == {"machine": {"cores": 2}, "date": "2026-01-02", "tokens": 2, "seconds": 3.0}


def test_a_row_without_an_origin_has_that_of_its_result(write, tmp_path):
    before = {"machine": {"cores": 4}, "date": "2025-01-01", "rows": [{"tokens": 7, "seconds": 1.0}]}
    (tmp_path / "result.json").write_text(json.dumps(before))
    rows = write("2026-01-02", 1, 2.0)["rows"]
    assert [row["machine"]["cores"] for row in rows] == [2, 4]
