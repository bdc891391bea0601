"""One server by the tools that people measure with: `python -m benchmarks.load_tools models/NAME`.

`vllm bench serve`, GuideLLM and AIPerf send the same kind of prompts to one `starling serve`, one after the other: a
question behind 8 of 24 documents, in an order of its own. Each tool runs with star off, with star, and with documents
(`star_segments`), which go with each request as `vllm_xargs`. All documents have been computed for other prompts
before. Writes results/load_tools_NAME.json and .png. `make load-tools` installs GuideLLM and AIPerf; vLLM's tool needs
pandas, which `make bench` has. Takes about 10 minutes for 135M parameters on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.engine import ROOT
from benchmarks.report import saved_figure, write_json
from examples.server import serving

SEPARATOR = "<file_sep>"
TEXTS = ("argparse", "ast", "asyncio/base_events", "decimal", "_pydecimal", "difflib", "doctest", "inspect", "typing")
DOCUMENTS, RETRIEVED, CHARACTERS, NEW_TOKENS = 24, 8, 1800, 16
PLANS: dict[str, dict[str, Any]] = {
    "star off": {"star": "off"},
    "star": {"star": "on"},
    "documents": {"star": "on", "star_segments": SEPARATOR},
}
TOOLS = ROOT / "build" / "load-tools"
"""The folder of the tools' environments: their packages ask for other versions than vLLM's."""
PROGRAMS = {"GuideLLM": TOOLS / "guidellm" / "bin" / "guidellm", "AIPerf": TOOLS / "aiperf" / "bin" / "aiperf"}


def make_documents() -> list[str]:
    """Return pieces of Python's library, of CHARACTERS each, from its longest files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / f"{name}.py").read_text() for name in TEXTS)
    pieces = [text[start : start + CHARACTERS] for start in range(0, len(text), 4 * CHARACTERS)]
    return [f"{SEPARATOR}{piece}\n" for piece in pieces[:DOCUMENTS]]


def make_prompts(documents: Sequence[str], number: int, order: random.Random) -> list[str]:
    """Return questions, each behind RETRIEVED of the documents."""
    return [
        "".join([*order.sample(documents, RETRIEVED), f"{SEPARATOR}What does function {question} return?\n"])
        for question in range(number)
    ]


def bench_serve(url: str, model: str, prompts: Sequence[str], body: dict[str, Any], folder: Path) -> list[float]:
    """Return the milliseconds to the first token of each prompt, by `vllm bench serve`."""
    data = write_lines(folder, [{"prompt": prompt, "output_tokens": NEW_TOKENS} for prompt in prompts])
    run(
        [Path(sys.executable).with_name("vllm"), "bench", "serve", "--base-url", url, "--model", model],
        ["--served-model-name", "model", "--dataset-name", "custom", "--dataset-path", data, "--skip-chat-template"],
        ["--disable-shuffle", "--custom-output-len", NEW_TOKENS, "--num-prompts", len(prompts), "--num-warmups", 0],
        ["--max-concurrency", 1, "--extra-body", json.dumps(body), "--save-result", "--save-detailed"],
        ["--result-dir", folder, "--result-filename", "result.json", "--ready-check-timeout-sec", 0],
    )
    return [1000 * seconds for seconds in json.loads((folder / "result.json").read_text())["ttfts"]]


def guidellm(url: str, model: str, prompts: Sequence[str], body: dict[str, Any], folder: Path) -> list[float]:
    """Return the milliseconds to the first token of each prompt, by GuideLLM."""
    data, out = write_lines(folder, [{"prompt": prompt} for prompt in prompts]), folder / "result.json"
    backend = {
        "kind": "openai_http",
        "target": url,
        "model": "model",
        "request_format": "/v1/completions",
        "extras": {"body": body},
    }
    run(
        [PROGRAMS["GuideLLM"], "run", "--backend", json.dumps(backend)],
        ["--tokenizer", f"kind=huggingface_auto,model={model}", "--data", f"kind=json_file,path={data}"],
        ["--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={len(prompts)}"],
        ["--output", f"kind=json,path={out}", "--disable-console"],
        without=("PYTHONPATH",),
    )
    done = json.loads(out.read_text())["benchmarks"][0]["requests"]["successful"]
    return [request["time_to_first_token_ms"] for request in done]


def aiperf(url: str, model: str, prompts: Sequence[str], body: dict[str, Any], folder: Path) -> list[float]:
    """Return the milliseconds to the first token of each prompt, by AIPerf."""
    data = write_lines(folder, [{"text": prompt} for prompt in prompts])
    run(
        [PROGRAMS["AIPerf"], "profile", "--model", "model", "--url", url, "--tokenizer", model],
        ["--endpoint-type", "completions", "--streaming", "--input-file", data, "--custom-dataset-type", "single_turn"],
        ["--dataset-sampling-strategy", "sequential", "--request-count", len(prompts), "--concurrency", 1],
        ["--extra-inputs", json.dumps(body), "--artifact-dir", folder / "artifacts", "--ui", "none"],
        # offline, AIPerf takes the folder of a model for a name on the hub
        without=("PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    )
    lines = (folder / "artifacts" / "profile_export.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"]["time_to_first_token"]["value"] for line in lines]


Measure = Callable[[str, str, Sequence[str], dict[str, Any], Path], list[float]]
MEASURES: dict[str, Measure] = {"vllm bench serve": bench_serve, "GuideLLM": guidellm, "AIPerf": aiperf}


def write_lines(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write a new folder's data set, as JSON lines; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: Sequence[object], without: Sequence[str] = ()) -> None:
    """Run a tool from the folder of the repository.

    Args:
        without: variables that are left out of its environment.

    Raises:
        RuntimeError: it has failed; with its output.
    """
    command = [str(argument) for part in arguments for argument in part]
    environment = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def measure(model: str, number: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return tool -> plan -> milliseconds to the first token of each of its prompts."""
    documents = make_documents()
    options = ["--served-model-name", "model", "--max-model-len", "8192", "--enforce-eager"]
    found: dict[str, dict[str, list[float]]] = {tool: {} for tool in MEASURES}
    with serving(model, *options, grpc_port=None, log=folder / "server.log") as server:
        for plan, xargs in PLANS.items():
            body = {"temperature": 0, "ignore_eos": True, "max_tokens": NEW_TOKENS, "vllm_xargs": xargs}
            for first in range(0, DOCUMENTS, RETRIEVED):  # all documents are computed once
                prompt = make_prompts(documents[first : first + RETRIEVED], 1, random.Random(first))[0]
                answer = httpx.post(
                    f"{server.http}/v1/completions", json=body | {"model": "model", "prompt": prompt}, timeout=600
                )
                answer.raise_for_status()
            for place, (tool, of_tool) in enumerate(MEASURES.items()):
                prompts = make_prompts(documents, number, random.Random(1000 + place))
                times = of_tool(server.http, model, prompts, body, folder / f"{place}-{plan.replace(' ', '-')}")
                if len(times) != number:
                    raise RuntimeError(f"{tool} has {len(times)} answers to {number} prompts")
                found[tool][plan] = times
                Console().print(f"{tool}, {plan}: {statistics.median(times):.0f} ms")
    return found


def show(medians: dict[str, dict[str, float]]) -> None:
    table = Table(title="first token, median, ms")
    for column in ("tool", *PLANS):
        table.add_column(column, justify="right")
    for tool, values in medians.items():
        table.add_row(tool, *(f"{values[plan]:.0f}" for plan in PLANS))
    Console().print(table)


def plot(medians: dict[str, dict[str, float]], path: Path) -> None:
    with saved_figure(path, figsize=(7, 3)) as (_, axes):
        axis, width = axes, 0.8 / len(PLANS)
        for index, plan in enumerate(PLANS):
            places = [tool + width * (index - 1) for tool in range(len(medians))]
            bars = axis.bar(places, [values[plan] for values in medians.values()], width, label=plan)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(medians)), list(medians))
        axis.set_ylabel("ms to the first token, median")
        axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a model")
    parser.add_argument("--prompts", type=int, default=12, help="of each tool and plan")
    args = parser.parse_args()
    name = Path(args.model).name
    found = measure(args.model, args.prompts, ROOT / "benchmarks" / "out" / "load_tools")
    medians = {tool: {plan: statistics.median(times) for plan, times in of.items()} for tool, of in found.items()}
    show(medians)
    path = write_json(f"load_tools_{name}", {"model": name, "milliseconds": found, "medians": medians})
    plot(medians, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
