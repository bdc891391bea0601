"""docs/faults.md is made from the results of the fault matrix."""

from __future__ import annotations

import json
from dataclasses import asdict

from tests.faults.clients import CLIENTS
from tests.faults.page import PAGE, page
from tests.faults.run import RESULTS
from tests.faults.run_cell import Result
from tests.faults.table import cells


def test_the_committed_page_is_that_of_the_committed_results():
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results), "run `make faults`"


def test_each_result_is_that_of_a_cell_of_the_table():
    assert set(json.loads(RESULTS.read_text())) <= {cell.name for cell in cells()}


def test_the_page_says_what_differed():
    first, second, *_ = cells()
    ends = dict.fromkeys(CLIENTS, "answer")
    as_expected = asdict(Result(ends=ends, http_health=["200"], grpc_health=["SERVING"], seconds=2.5))
    differs = as_expected | {"ends": ends | {"gRPC": "silence"}, "faults": ["gRPC: silence", "left: 3 | pages"]}
    text = page({first.name: as_expected, second.name: differs})
    head = f"| {first.fault} | {first.target} | {first.moment} | answer within 120 s, serves on |"
    assert f"{head} answer, all four | 2.5 | 200 | SERVING | as expected |" in text
    assert "answer: HTTP, HTTP stream, gRPC stream; silence: gRPC" in text
    assert "**differs**: gRPC: silence; left: 3 \\| pages |" in text
    assert " cells 2 were run. In 1 of them all was as expected.\nThe others;" in text
    first_of = (
        f"| {second.server} | {second.fault} | {second.target} | {second.moment} | gRPC: silence; left: 3 \\| pages |\n"
    )
    assert text.index(first_of) < text.index("## How it is measured") < text.index("**differs**")
    assert "Cells without a result: " in text
