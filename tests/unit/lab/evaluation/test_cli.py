"""`starling eval` as a user runs it, against a server in this process."""

from __future__ import annotations

import json
from importlib import util

import pytest

from starling.engine_ext.serving.cli.main import main
from starling.lab import command_line
from starling.lab.evaluation import report, server_process
from starling.lab.evaluation.commands import eval as cli
from starling.lab.evaluation.report import Report
from tests.unit.lab.evaluation.eval_runs import TASKS, Page, evaluate, knows
from tests.unit.lab.evaluation.fake_server import MAX_MODEL_LEN, served

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_run_writes_results_that_a_second_run_finds(tmp_path, capsys):
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
        output = capsys.readouterr().out
        report = Report.model_validate_json((tmp_path / "results.json").read_text())
        cells = {(cell.task, cell.length): cell for cell in report.cells}
        assert set(cells) == {(task, n) for task in ("vt", "niah_single_1") for n in (2000, 3000)} | {("all", None)}
        assert all(cells["niah_single_1", n].score == 1 and cells["vt", n].score == 0 for n in (2000, 3000))
        assert cells["vt", 2000].difference.high == cells["vt", 2000].difference.low == -1
        assert (cells["all", None].prompts, cells["all", None].difference.mean) == (12, -0.5)
        stored = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
        plans = [line["server_plan"] for line in stored if line["plan"] == "n/8"]
        ranges = []
        for letter, name in (("B", "block_size"), ("A", "anchor_size"), ("O", "overlap_size")):
            sizes = [plan[name] for plan in plans]
            assert min(sizes) < max(sizes), "of prompts of two lengths"
            ranges.append(f"{letter} {min(sizes)}-{max(sizes)}")
        assert ", ".join(ranges) in output and ", ".join(ranges) in (tmp_path / "report.html").read_text()
        assert sum(cell.prompts for cell in report.depths) == 6 and "By the depth" in output, "of niah_single_1"
        assert "n/8 scores 50.0 % over 12 prompts, dense 100.0 %: -50.0 [-50.0, -50.0] points, below dense" in output
        assert "written to" in output and "found" not in output
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 24
        asked = len(fake.completions)
        assert evaluate(fake, tmp_path) == 0
        assert len(fake.completions) == asked + 1
        assert "found 24 of 24 answers" in capsys.readouterr().out
        again = Report.model_validate_json((tmp_path / "results.json").read_text())
        assert again.cells == report.cells
        more = (*TASKS, "--plan", "n/4", "--prompts-per-cell", "4")
        assert evaluate(fake, tmp_path, *more) == 0
        assert "found 24 of 48 answers" in capsys.readouterr().out
        assert json.loads((tmp_path / "setup.json").read_text()) == {"version": 1, "model": "fake"}


def test_another_format_is_refused_before_a_server_starts_and_another_model_after(tmp_path, capsys, monkeypatch):
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
    monkeypatch.setattr(server_process.sys, "executable", "/bin/false")
    (tmp_path / "setup.json").write_text('{"version": 0, "model": "fake"}')
    assert cli.run(["some/model", *TASKS, "--out", str(tmp_path)]) == 2
    assert "version was 0 and is 1" in capsys.readouterr().err
    (tmp_path / "setup.json").write_text('{"version": 1, "model": "fake"}')
    with served(answer=knows, models=("other",)) as fake:
        assert evaluate(fake, tmp_path) == 2
    assert "model was 'fake' and is 'other'" in capsys.readouterr().err
    (tmp_path / "setup.json").write_text("[1]")
    assert cli.run(["some/model", *TASKS, "--out", str(tmp_path)]) == 2
    assert "setup.json is damaged" in capsys.readouterr().err


def test_the_html_report_escapes_texts_and_loads_nothing(tmp_path):
    with served(answer=knows, models=("<b>model</b>",)) as fake:
        assert evaluate(fake, tmp_path) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags
    text = "".join(page.text)
    assert "<script>alert(1)</script>" in text and "<b>model</b>" in text
    assert all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert "--plan n/8 --tasks vt,niah_single_1 --lengths 2000,3000" in text
    assert "Which variables have the value" in text, "the end of a prompt is shown"


def test_a_run_without_matplotlib_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
    assert "no figure: it needs matplotlib (vllm-starling's extra `bench`)" in capsys.readouterr().out
    assert not (tmp_path / "differences.png").exists()
    assert "img" not in Page((tmp_path / "report.html").read_text()).tags


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="matplotlib is optional")
def test_the_figure_is_in_a_file_and_in_the_report(tmp_path):
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert Page((tmp_path / "report.html").read_text()).tags.count("img") == 1


def test_one_prompt_of_each_task_has_a_figure(tmp_path, capsys):
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path, "--tasks", "ruler", "--prompts-per-cell", "1", "--plan", "n/8") == 0
    assert (tmp_path / "differences.png").exists() == (util.find_spec("matplotlib") is not None)
    assert "matplotlib failed" not in capsys.readouterr().out


def test_a_figure_that_fails_costs_nothing_but_the_figure(tmp_path, monkeypatch, capsys):
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
        (tmp_path / "report.html").unlink()
        capsys.readouterr()

        def fail(cells):
            raise ValueError("the image is too large")

        monkeypatch.setattr(cli, "figure_png", fail)
        assert evaluate(fake, tmp_path) == 0
    output = capsys.readouterr().out
    assert "no figure: matplotlib failed: ValueError: the image is too large" in output and "n/8 scores" in output
    assert (tmp_path / "report.html").exists() and not (tmp_path / "differences.png").exists()


def test_own_prompts_with_and_without_answers(tmp_path, capsys):
    lines = [
        {"prompt": "a" * 300, "answer": ["on", "off"], "match": "any"},
        {"messages": [{"role": "user", "content": "b" * 300}], "answer": "off"},
        {"prompt": "c" * 300},
        {"prompt": "d" * 300},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines[:3])))
    with served(answer=lambda prompt, xargs: "same" if prompt[0] == "c" else xargs["star"]) as fake:
        options = ("--prompts", str(file), "--plan", "n/8", "--logprobs", "2", "--max-tokens", "5")
        assert evaluate(fake, tmp_path / "out", *options) == 0
        assert {body["max_tokens"] for body in fake.completions} == {1, 5}
        file.write_text("\n".join(map(json.dumps, lines)))
        assert evaluate(fake, tmp_path / "out", *options) == 0
        assert "found 6 of 8 answers" in capsys.readouterr().out
    report = Report.model_validate_json((tmp_path / "out" / "results.json").read_text())
    cells = {cell.task: cell for cell in report.cells}
    assert set(cells) == {"prompts", "prompts without answers"}
    assert (cells["prompts"].dense_score, cells["prompts"].score) == (1.0, 0.5)
    assert (cells["prompts without answers"].dense_score, cells["prompts without answers"].score) == (1.0, 0.5)
    assert cells["prompts"].logprob_difference.mean == pytest.approx(-0.5)
    assert cells["prompts"].top1_agreement == 0.0
    assert cells["prompts"].kl > 0
    assert report.different[0].prompt == "line 2"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "either MODEL, which is then served, or --base-url is needed"),
        (("model", "--base-url", "http://x"), "and not both"),
        (("--base-url", "http://x", "--dtype", "float32"), "unknown options: --dtype"),
        (("--base-url", "http://x", "--dtype=float32"), "unknown options: --dtype=float32"),
        (("--base-url", "http://x", "--task=vt"), "unknown options: --task=vt"),
        (("--base-url", "localhost:8000"), "base_url='localhost:8000' is refused"),
        (("--base-url", "http://me:secret@x"), "base_url='http://...@x' is refused: it has @"),
        (("--base-url", "http://x/v1?key=1", "--tasks", "vt"), "is refused: it has ?"),
        (("--base-url", "http://x#v1", "--tasks", "vt"), "is refused: it has #"),
        (("--base-url", "http://x:80a", "--tasks", "vt"), "base_url='http://x:80a' is refused: Port could not be cast"),
        (("--base-url", "http://x:99999", "--tasks", "vt"), "is refused: Port out of range"),
        (("--base-url", "http://x", "--tasks", "vt", "--api-key", "sk \n"), "the key of --api-key is refused"),
        (("--base-url", "http://x", "--tasks", "vt", "--lengths", "512,512"), "a length is given twice"),
        (("--base-url", "http://x", "--concurrency", "0"), "concurrency=0 is refused"),
        (("--base-url", "http://x", "--timeout", "-1"), "timeout=-1.0 is refused"),
        (("--base-url", "http://x", "--tasks", "vt,qa_1"), "tasks='qa_1' is refused"),
        (
            ("--base-url", "http://x", "--tasks", "vt", "--plan", "n/0x"),
            "plan='n/0x': star_block_size='n/0x' is refused",
        ),
        (("model", "--port", "1", "--tasks", "vt"), "--port is refused"),
        (("model", "--api-key", "k", "--tasks", "vt"), "--api-key goes with --base-url"),
    ],
)
def test_unusable_arguments(tmp_path, capsys, options, reason):
    assert main(["eval", *options, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("starling eval: error: ") and reason in printed.err
    assert printed.out == ""


def test_help_names_every_option_of_the_evaluation(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in cli.EvalOptions.model_fields if name != "plans")
    assert "--plan" in printed and "niah_multikey_3" in printed


@pytest.mark.parametrize(
    ("settings", "options", "code", "reason"),
    [
        ({"engages": False}, TASKS, 1, "plan='n/8' did not engage"),
        ({"starling": False}, TASKS, 1, "Starling is not activated"),
        ({"tokenizes": False}, TASKS, 1, "has no /tokenize, which measures the lengths of prompts: give the"),
        (
            {"chat_tokens": (422, "prompt: Field required")},
            TASKS,
            1,
            "Field required\nIf this is not vLLM's /tokenize, give",
        ),
        ({}, (*TASKS, "--tokenizer", "no/such"), 2, "tokenizer='no/such' is refused: it is no folder"),
        ({"templated": False}, TASKS, 1, "there is no chat template\nWithout a chat template: --prompt-format text"),
        ({}, ("--tasks", "cwe", "--lengths", "1000"), 2, "lengths=1000 is too short for the task cwe"),
        (
            {},
            ("--tasks", "vt", "--lengths", "300,120000"),
            2,
            "lengths=120000 is refused: the server's max_model_len is",
        ),
    ],
)
def test_what_a_server_can_not_do(tmp_path, capsys, settings, options, code, reason):
    with served(answer=knows, **settings) as fake:
        assert evaluate(fake, tmp_path, *options) == code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"starling": False}, {}])
def test_what_a_server_can_not_do_is_refused_before_prompts_are_made(tmp_path, settings):
    options = ("--tasks", "vt", "--plan", "n/8") if settings else ("--tasks", "vt", "--lengths", "120000")
    with served(templated=False, **settings) as fake:
        assert evaluate(fake, tmp_path, *options) == (1 if settings else 2)
        assert len(fake.keys) == len(["models", "tokenize", "completion", "version"])


def test_equal_prompts_count_once(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    lines = [{"prompt": letter * 300, "answer": "x"} for letter in "abba"]
    file.write_text("\n".join(map(json.dumps, lines)))
    with served() as fake:
        options = ("--prompts", str(file), "--plan", "n/8", "--concurrency", "4")
        assert evaluate(fake, tmp_path / "out", *options) == 0
        assert len(fake.completions) == 1 + 2 * 2
    report = Report.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert [cell.prompts for cell in report.cells] == [2]
    assert "2 prompts are equal to others, and are left out" in capsys.readouterr().out
    assert "--concurrency 4 --timeout 600 " in report.command


def test_an_expected_answer_that_is_too_long_for_the_server_is_refused(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "a" * (MAX_MODEL_LEN - 10), "answer": "x" * 20}))
    with served() as fake:
        options = ("--prompts", str(file), "--max-tokens", "5")
        assert evaluate(fake, tmp_path / "out", *options, "--logprobs", "11") == 2
        assert f"the prompt line 1 needs {MAX_MODEL_LEN + 1} tokens with its answer" in capsys.readouterr().err
        assert evaluate(fake, tmp_path / "out", *options, "--logprobs", "10") == 0


@pytest.mark.parametrize("name", ["a file", "a file/below"])
def test_a_folder_that_can_not_be_made_is_refused(tmp_path, capsys, name):
    (tmp_path / "a file").write_text("")
    assert cli.run(["--base-url", "http://127.0.0.1:1", *TASKS, "--out", str(tmp_path / name)]) == 2
    assert f"out='{tmp_path / name}' is refused: " in capsys.readouterr().err


def test_a_log_has_whole_rows_and_lines_of_progress_in_place_of_bars(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS")
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
        output = capsys.readouterr().out
        assert [line for line in output.splitlines() if "difference [95 %]" in line and "attention work" in line]
        assert "answers: 1 of 24" not in output and "left" not in output
        monkeypatch.setattr(command_line, "LINE_SECONDS", 0.0)
        assert evaluate(fake, tmp_path / "again") == 0
    output = capsys.readouterr().out
    assert all(f"answers: {number} of 24" in output for number in range(1, 25)) and "prompts: 4 of 4" in output


def test_the_key_of_the_environment_is_sent_and_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    with served(answer=knows) as fake:
        assert evaluate(fake, tmp_path) == 0
        assert set(fake.keys) == {"Bearer very-secret"}
    assert not any(b"very-secret" in path.read_bytes() for path in tmp_path.iterdir())
