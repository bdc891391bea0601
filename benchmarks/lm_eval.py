"""Star plans by lm-evaluation-harness, beside `starling eval`: `python -m benchmarks.lm_eval models/NAME`.

Starts one server, and runs `lm_eval` on it once with dense attention and once with each --plan. Of RULER's tasks the
plans are the paper's at n/8, and the default anchor and overlap without dense heads, with a tenth of them, and at n/16
with a fifth. The task `retrieval` has the questions of benchmarks.rag behind answered examples, as a local task of
lm_eval; its plan is documents. The plan goes with each request, as `vllm_xargs` in `--gen_kwargs`. Writes
results/lm_eval_NAME_LENGTH.json, with the tasks in its name unless they are the default. docs/star-accuracy.md has its
table, and docs/eval.md says how to install lm_eval.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.accuracy import ENGINE, QUERY_TOKENS, plans
from benchmarks.engine import ROOT
from benchmarks.rag_prompts import CHARACTERS, LONG, MARK, prompt_of, retrieval_questions
from benchmarks.report import markdown_table, write_json
from benchmarks.soak.target import series_sum
from examples.stdlib_documents import Index, make_documents
from starling.lab.evaluation.prompt_options import DENSE, Plan, parse_plan, with_dense
from starling.lab.evaluation.server_process import served
from starling.lab.statistics import bootstrap

PROGRAM = ROOT / "build" / "lm-eval" / "bin" / "lm_eval"
FOLDER = ROOT / "benchmarks" / "out" / "lm_eval"
RETRIEVAL = "retrieval"
TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_fwe", "ruler_cwe", RETRIEVAL)
"""Tasks of lm_eval that load nothing from a hub, and that of documents, which is written here."""

DEFAULT_TASKS = ("niah_multikey_2", "ruler_vt")
DOCUMENTS = f"S={MARK}"

RETRIEVAL_TASK = {
    "task": RETRIEVAL,
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
    # The model may write the module before the name.
    "filter_list": [
        {"name": "name", "filter": [{"function": "regex", "regex_pattern": r"(\w+)\W*$"}, {"function": "take_first"}]}
    ],
    "metric_list": [{"metric": "exact_match"}],
}
"""Of lm_eval's form, without the file of the prompts."""

PARTS = (8, 16)  # n/B
TEMPLATE_TOKENS = 512
"""At most, of the chat template. lm_eval's lengths do without it, and lm_eval cuts off the start of longer prompts."""


def write_retrieval(folder: Path, number: int) -> None:
    """Write the task of documents into the folder: its prompts, and what lm_eval reads of a task."""
    examples, asked = retrieval_questions(Index(make_documents(CHARACTERS)), number)
    prompts = [{"prompt": prompt_of(LONG, examples, found, each), "answer": each.answer} for each, found in asked]
    path = folder / f"{RETRIEVAL}.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    task = RETRIEVAL_TASK | {"dataset_kwargs": {"data_files": {"test": str(path)}}}
    (folder / f"{RETRIEVAL}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def harness_command(
    program: Path, base_url: str, model: str, plan: Plan, tasks: Sequence[str], length: int, limit: int, out: Path
) -> list[str]:
    """Return the command of one run of lm_eval: all tasks with one plan.

    Args:
        model: a folder with a model, by the name that the server has for it.
        tasks: tasks of lm_eval.
        length: number of tokens of a prompt and its answer, as lm_eval counts them.
        limit: number of prompts of each task.
        out: the folder for the answers.
    """
    arguments = {
        "model": model,
        "base_url": f"{base_url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "max_length": length + TEMPLATE_TOKENS,
        "timeout": 600,
    }
    command = [str(program), "run", "--model", "local-completions", "--model_args", json.dumps(arguments)]
    command += ["--tasks", ",".join(tasks), "--metadata", json.dumps({"max_seq_lengths": [length]})]
    command += ["--gen_kwargs", json.dumps({"vllm_xargs": plan.options}), "--limit", str(limit)]
    # The prompts of documents have the template's tokens already.
    command += ["--include_path", str(out.parent)] if RETRIEVAL in tasks else ["--apply_chat_template"]
    return [*command, "--output_path", str(out), "--log_samples"]


def star_requests(base_url: str) -> float:
    """Return the number of requests that the server has run with Star Attention."""
    text = httpx.get(f"{base_url}/metrics", timeout=60).text
    return series_sum(text, 'starling:requests_total{[^}]*attention="star"[^}]*}')


def read_samples(out: Path, task: str, length: int) -> dict[str, tuple[float, str]]:
    """Score and text of each answer of a run, by the hash of the prompt."""
    (path,) = out.rglob(f"samples_{task}_*.jsonl")
    samples = map(json.loads, path.read_text(encoding="utf-8").strip("\n").split("\n"))
    score = "exact_match" if task == RETRIEVAL else str(length)
    return {sample["prompt_hash"]: (sample[score], sample["resps"][0][0]) for sample in samples}


def harness_version(out: Path) -> str:
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())["lm_eval_version"]


def make_cell(
    task: str, plan: str, dense: dict[str, tuple[float, str]], star: dict[str, tuple[float, str]]
) -> dict[str, Any]:
    """Make the cell of a task under a plan beside dense, with the field names of `starling eval`'s cells.

    Raises:
        ValueError: the two runs had different prompts.
    """
    if dense.keys() != star.keys():
        raise ValueError(f"{task}: lm_eval gave {plan} other prompts than dense")
    pairs = [(dense[prompt], star[prompt]) for prompt in dense]
    return {
        "task": task,
        "plan": plan,
        "prompts": len(pairs),
        "dense_score": sum(one[0] for one, _ in pairs) / len(pairs),
        "score": sum(two[0] for _, two in pairs) / len(pairs),
        "difference": bootstrap([[two[0] - one[0] for one, two in pairs]]).model_dump(),
        "same_as_dense": sum(one[1] == two[1] for one, two in pairs) / len(pairs),
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/star-accuracy.md: a row for each task and plan of each run."""
    rows = []
    for result in results:
        for cell in result["cells"]:
            mean, low, high = (100 * cell["difference"][name] for name in ("mean", "low", "high"))
            plan = cell["plan"].replace(f",Q={QUERY_TOKENS}", "").replace("|", "\\|")
            dense = f"{100 * cell['dense_score']:.0f} %"
            difference = f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]"
            rows.append([f"`{cell['task']}`, {cell['prompts']}", f"`{plan}`", dense, difference])
    return markdown_table(["task, prompts", "plan", "dense", "difference [95 %]"], rows)


def folder_of(folder: Path, plan: str) -> Path:
    return folder / re.sub(r"\W+", "-", plan)


def default_plans(tasks: Sequence[str], length: int) -> list[str]:
    if RETRIEVAL in tasks:
        return [DOCUMENTS]
    paper, overlap, _, smaller = plans(length, [*PARTS])
    return [paper, f"{overlap},H=0", f"{overlap},H=0.1", f"{smaller},H=0.2"]


def measure(
    program: Path, model: str, tasks: Sequence[str], length: int, limit: int, names: Sequence[str], options: list[str]
) -> dict[str, Any]:
    """Run all plans on one server.

    Args:
        names: names of the plans.

    Raises:
        subprocess.CalledProcessError: lm_eval failed.
        ValueError: two plans are the same, star did not run on each prompt of a star plan, or the plans had different
            prompts.
    """
    folder = FOLDER / f"{Path(model).name}_{length}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if RETRIEVAL in tasks:
        write_retrieval(folder, limit)
    named = {plan.name: plan for plan in with_dense(map(parse_plan, names))}
    with served(model, [*ENGINE, *options], folder / "server.log") as base_url:
        for name, plan in named.items():
            before, out = star_requests(base_url), folder_of(folder, name)
            command = harness_command(program, base_url, model, plan, tasks, length, limit, out)
            subprocess.run(command, check=True, cwd=ROOT)
            ran, expected = star_requests(base_url) - before, 0 if plan.is_dense else limit * len(tasks)
            if ran != expected:
                raise ValueError(f"{name}: star ran on {ran:.0f} prompts, and {expected} were expected")
    return result_of(model, tasks, length, named, folder)


def result_of(model: str, tasks: Sequence[str], length: int, named: dict[str, Plan], folder: Path) -> dict[str, Any]:
    """Return the stored result, from a folder that has lm_eval's output of each plan by name (raises ValueError)."""
    found = {name: {task: read_samples(folder_of(folder, name), task, length) for task in tasks} for name in named}
    dense = found.pop(DENSE.name)
    return {
        "model": Path(model).name,
        "tokens": length,
        "lm_eval": harness_version(folder_of(folder, DENSE.name)),
        "plans": {name: plan.options for name, plan in named.items()},
        "cells": [make_cell(task, name, dense[task], found[name][task]) for task in tasks for name in found],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a model, relative to the repository")
    parser.add_argument("--lm-eval", type=Path, default=PROGRAM, help="the program (%(default)s)")
    parser.add_argument("--plan", action="append", metavar="PLAN", help="in place of the default ones; repeatable")
    parser.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS, choices=TASKS, help="(%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt and its answer (%(default)s)")
    parser.add_argument("--prompts", type=int, default=20, help="of each task (%(default)s)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more options of `starling serve`")
    args = parser.parse_args()
    if not args.lm_eval.exists():
        parser.error(f"{args.lm_eval} does not exist: docs/eval.md says how to install lm_eval")
    if RETRIEVAL in args.tasks and len(args.tasks) > 1:
        parser.error(f"--tasks {RETRIEVAL} stands alone: its plans are not those of the other tasks")
    names = args.plan or default_plans(args.tasks, args.length)
    result = measure(args.lm_eval, args.model, args.tasks, args.length, args.prompts, names, args.serve)
    part = "" if set(args.tasks) == set(DEFAULT_TASKS) else "_" + "_".join(args.tasks)
    path = write_json(f"lm_eval_{result['model']}_{result['tokens']}{part}", result)
    print(markdown([result]))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
