"""`starling eval` starts `starling serve` itself, measures star beside dense, and goes on with stored answers.

`starling advise` measures plans on the same server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import ENVIRONMENT, serving
from starling.lab.evaluation.advice import Advice
from starling.lab.evaluation.report import Report
from tests.e2e.serving import MODEL, PAGE_SIZE, PROMPT
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

STARLING = str(Path(sys.executable).with_name("starling"))
ENGINE = ("--dtype", "float32", "--enforce-eager", "--block-size", str(PAGE_SIZE), "--served-model-name", MODEL)
PLANS = ("n/8", "B=128,A=64,Q=40")
MEASURED = ("--tasks", "niah_single_2,vt", "--lengths", "1200,2000", "--prompts-per-cell", "2", "--logprobs", "2")
PLAN_OPTIONS = tuple(part for plan in PLANS for part in ("--plan", plan))
NUM_ANSWERS = 2 * 2 * 2 * (1 + len(PLANS))


def evaluate(*arguments: str, command: str = "eval") -> subprocess.CompletedProcess:
    words = [STARLING, command, *arguments]
    environment = ENVIRONMENT | os.environ | {"COLUMNS": "300"}
    return subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def lines(folder: Path) -> list[dict]:
    return list(map(json.loads, (folder / "results.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, *ENGINE, log=tmp_path_factory.mktemp("server") / "log", grpc_port=None) as server:
        yield server


@pytest.fixture(scope="module")
def measured(server, tmp_path_factory):
    """(folder, output) of a run."""
    folder = tmp_path_factory.mktemp("results")
    done = evaluate("--base-url", server.http, *MEASURED, *PLAN_OPTIONS, "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_star_engages_and_its_numbers_are_those_of_the_plans(measured):
    folder, _ = measured
    answers = lines(folder)
    assert len(answers) == NUM_ANSWERS
    for answer in answers:
        plan = answer["server_plan"]
        assert plan["attention"] == ("dense" if answer["plan"] == "dense" else "star")
        if answer["plan"] == "n/8":
            assert plan["block_size"] == -(-plan["prompt_tokens"] // (8 * PAGE_SIZE)) * PAGE_SIZE
            assert plan["keys_attended"] < plan["dense_keys"]
        elif answer["plan"] == PLANS[1]:
            assert (plan["block_size"], plan["anchor_size"]) == (128, 64)
            assert plan["context_end"] == plan["prompt_tokens"] - 40


def test_star_moves_the_distributions_and_dense_is_its_own_measure(measured):
    folder, output = measured
    report = Report.model_validate_json((folder / "results.json").read_text())
    assert len(report.cells) == (2 * 2 + 1) * len(PLANS)
    assert all(cell.prompts == (8 if cell.task == "all" else 2) for cell in report.cells)
    for cell in report.cells:
        assert 0 < cell.attended_keys < 1
        assert cell.kl > 1e-4, "star's distributions differ: the mask was engaged"
    assert {"results.json", "report.html", "setup.json"} <= {path.name for path in folder.iterdir()}
    assert re.search(r"n/8 scores [\d.]+ % over 8 prompts", output)
    dense = [answer for answer in lines(folder) if answer["plan"] == "dense"]
    for answer in dense:
        assert len(answer["scores"]) == 2
        for score in answer["scores"]:
            assert score["logprob"] <= max(score["top"].values()) + 1e-9 < 0
            assert len(score["top"]) in (20, 21)


def test_a_second_run_resumes_on_a_server_that_it_starts_itself(measured, model, server):
    folder, _ = measured
    before = Report.model_validate_json((folder / "results.json").read_text())
    stored = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(stored[:-2]) + stored[-2][:50])
    done = evaluate(str(model), *ENGINE, *MEASURED, *PLAN_OPTIONS, "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "server.log").exists()
    assert f"found {NUM_ANSWERS - 2} of {NUM_ANSWERS} answers" in done.stdout
    again = Report.model_validate_json((folder / "results.json").read_text())
    assert [(cell.task, cell.same_as_dense) for cell in again.cells] == [
        (cell.task, cell.same_as_dense) for cell in before.cells
    ]
    tokenizer = ("--tokenizer", str(model))  # in place of the server's /tokenize: the same prompts
    done = evaluate("--base-url", server.http, *MEASURED, *PLAN_OPTIONS, *tokenizer, "--out", str(folder))
    assert done.returncode == 0 and f"found {NUM_ANSWERS} of {NUM_ANSWERS} answers" in done.stdout, done.stderr


def ended(process: psutil.Process) -> bool:
    """A zombie has ended too: process 1 of a container may collect none."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_measurement_that_is_killed_leaves_no_server(model, tmp_path):
    many = ("--prompts-per-cell", "40")
    command = [STARLING, "eval", str(model), *ENGINE, *MEASURED, *many, "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT | os.environ, stdout=subprocess.DEVNULL)
    results, left = tmp_path / "results.jsonl", []
    try:
        assert wait_until(lambda: process.poll() is not None or (results.exists() and results.stat().st_size))
        assert process.poll() is None
        left = psutil.Process(process.pid).children(recursive=True)
        assert len(left) > 1, "the server and its engine"
        process.kill()
        assert wait_until(lambda: all(map(ended, left))), left
    finally:
        for each in (process, *left):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def test_what_is_refused(measured, server, tmp_path):
    twice = evaluate("--base-url", server.http, *MEASURED, "--plan", "n/4", "--plan", "n/4", "--out", str(measured[0]))
    assert twice.returncode == 2 and "it is given twice" in twice.stderr
    dense = evaluate("--base-url", server.http, *MEASURED, "--plan", "B=4096", "--out", str(tmp_path))
    assert dense.returncode == 1 and "plan='B=4096' did not engage" in dense.stderr


def test_log_probabilities_are_those_of_the_prompt_with_the_answer(server, tmp_path):
    """For own prompts without a reference, along dense's answer. vLLM's prompt_logprobs give the same."""
    file, results = tmp_path / "own.jsonl", tmp_path / "results"
    file.write_text(json.dumps({"prompt": PROMPT}))
    options = ("--plan", PLANS[1], "--logprobs", "4", "--max-tokens", "6", "--out", str(results))
    done = evaluate("--base-url", server.http, "--prompts", str(file), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    dense, star = lines(results)
    sent = {"prompt": PROMPT, "model": MODEL}
    tokens = httpx.post(f"{server.http}/tokenize", json=sent, timeout=300).json()["tokens"] + dense["token_ids"][:4]
    exact = {"star": "on", "star_block_size": 128, "star_anchor_size": 64, "star_query_tokens": 40 + 4}
    for answer, xargs in ((dense, {"star": "off"}), (star, exact)):
        body = {"model": MODEL, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0, "vllm_xargs": xargs}
        response = httpx.post(f"{server.http}/v1/completions", json=body, timeout=300).json()
        rows = zip(response["choices"][0]["prompt_logprobs"][-4:], tokens[-4:], strict=True)
        expected = [row[str(token)]["logprob"] for row, token in rows]
        assert [score["logprob"] for score in answer["scores"]] == pytest.approx(expected, abs=1e-4)
    assert [score["logprob"] for score in star["scores"]] != pytest.approx(
        [score["logprob"] for score in dense["scores"]], abs=1e-3
    )


def test_advise_counts_what_the_server_counts(server, tmp_path):
    """Keys and losses are those of the answers, whether or not a plan is good enough: the model is random."""
    file, results = tmp_path / "own.jsonl", tmp_path / "results"
    file.write_text("\n".join(json.dumps({"prompt": f"{number:02}" + PROMPT[2:]}) for number in range(20)))
    options = ("--base-url", server.http, "--prompts", str(file), "--out", str(results))
    done = evaluate(*options, command="advise")
    report = Advice.model_validate_json((results / "advice.json").read_text())
    assert done.returncode == (0 if report.flags else 3), done.stdout + done.stderr
    assert (report.prompts["searched"], report.prompts["held_out"]) == (10, 10)
    assert [row.plan for row in report.candidates] == ["n/16", "n/8", "n/4"][: len(report.candidates)] != []
    answers = lines(results)
    dense = {answer["prompt"]: answer["scores"] for answer in answers if answer["plan"] == "dense"}

    def lost(answer: dict) -> float:
        pairs = zip(dense[answer["prompt"]], answer["scores"], strict=True)
        return statistics.fmean(one["logprob"] - two["logprob"] for one, two in pairs)

    for row in report.candidates:
        of_plan = [answer for answer in answers if answer["plan"] == row.plan]
        shares = [answer["server_plan"]["keys_attended"] / answer["server_plan"]["dense_keys"] for answer in of_plan]
        assert statistics.fmean(shares) == pytest.approx(row.attended_keys)
        means = [row.searched, *([row.held_out] if row.held_out else [])]
        losses = list(map(lost, of_plan))
        assert len(losses) == sum(loss.prompts for loss in means)
        assert sum(losses) == pytest.approx(sum(loss.prompts * loss.mean for loss in means))
        assert any(losses), "star's distributions differ: the mask was engaged"
    again = evaluate(*options, command="advise")
    assert again.returncode == done.returncode and f"found {len(answers)} answers" in again.stdout
    assert len(lines(results)) == len(answers)
