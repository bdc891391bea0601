"""`benchmarks.goodput`: the runs that it asks vLLM's sweep for, and what it reads of the sweep's results."""

from __future__ import annotations

import json

from vllm.benchmarks.sweep.param_sweep import ParameterSweep

from benchmarks.goodput import FIGURES, MODES, read, runs_of, show
from benchmarks.random_llama import byte_tokenizer


def test_the_sweep_runs_each_rate_in_each_mode_with_other_prompts(tmp_path):
    (tmp_path / "runs.json").write_text(json.dumps(runs_of([0.5, 1.0], 8)))
    runs = ParameterSweep.read_json(tmp_path / "runs.json")
    letters = {"allowed_token_ids": byte_tokenizer()("abcdefghijklmnopqrstuvwxyz")["input_ids"]}
    assert [(run["request_rate"], json.loads(run["extra_body"])) for run in runs] == [
        (rate, body | letters) for rate in (0.5, 1.0) for body in MODES.values()
    ]
    assert len({run["seed"] for run in runs}) == len({run.name for run in runs}) == len(runs)
    command = runs[1].apply_to_cmd(["vllm", "bench", "serve"])
    assert command[command.index("--extra-body") + 1] == json.dumps(MODES["star"] | letters)


def test_results_are_read_by_rate_and_mode(tmp_path, capsys):
    for index, run in enumerate(reversed(runs_of([0.5, 1.0], 8))):
        folder = tmp_path / str(index)
        folder.mkdir()
        measured = {figure: index for figure in FIGURES} | {"failed": index}
        (folder / "summary.json").write_text(json.dumps([run | measured, run | measured]))
    rows = read(tmp_path)
    assert [(row["rate"], row["mode"]) for row in rows] == [(rate, mode) for rate in (0.5, 1.0) for mode in MODES]
    assert [row["request_goodput"] for row in rows] == [[3, 3], [2, 2], [1, 1], [0, 0]]
    assert [row["failed"] for row in rows] == [6, 4, 2, 0]
    show(rows)
    last = [line.split("│")[-2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert last == ["6", "4", "2", "0"]
