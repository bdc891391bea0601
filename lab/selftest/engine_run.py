"""Starts an engine in another process, so that a crash of it is a failed check and its memory is given back."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starling.config.entry import ENTRY
from starling.lab.selftest.engine import RESULT

TIMEOUT = 1800
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# In one process, all prompts of a batch are in the engine before its first step, so each run has the same steps.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Set in this process if it has made a scheduler; another engine must not write there.
COUNTERS = ("PROMETHEUS_MULTIPROC_DIR", "STARLING_METRICS_DIR")


class EngineError(RuntimeError):
    """An engine that ended without results; the message has the last lines that it printed."""


Batches = dict[str, list[dict[str, Any]]]
"""Name -> prompts, as engine.py describes them."""


@dataclass(frozen=True)
class Feature:
    """A feature that not every model can have: options of an engine that is made for it, and prompts that use it."""

    options: dict[str, Any]
    batches: Batches


@dataclass(frozen=True)
class EngineRun:
    """An engine and its batches. It runs when the results are read first.

    Attributes:
        engine: arguments of vllm.LLM.
        batches: batches of prompts.
        env: further environment of the process.
        features: name -> what the engine is made for. One whose options are refused is left out.
    """

    engine: dict[str, Any]
    batches: Batches
    env: dict[str, str] = field(default_factory=dict)
    features: dict[str, Feature] = field(default_factory=dict)

    @functools.cached_property
    def _result_or_error(self) -> dict[str, Any] | EngineError:
        features = dict(self.features)
        refused: dict[str, str] = {}
        while True:
            try:
                return run_engine(self._job(features.values()), self.env) | {"refused": refused}
            except EngineError as error:
                why = refusal_in(error)
                of = [name for name, feature in features.items() if why and any(map(why.__contains__, feature.options))]
                if not of:
                    return error
                refused |= dict.fromkeys(of, str(why))
                features = {name: feature for name, feature in features.items() if name not in of}

    def _job(self, features: Iterable[Feature]) -> dict[str, Any]:
        engine, batches = self.engine, self.batches
        for feature in features:
            entries = engine["additional_config"]
            engine = engine | {"additional_config": entries | {ENTRY: entries[ENTRY] | feature.options}}
            batches = batches | feature.batches
        return {"engine": engine, "batches": batches}

    @property
    def all_batches(self) -> Batches:
        """Return the batches, and those of all features."""
        return dict(self._job(self.features.values())["batches"])

    @property
    def has_run(self) -> bool:
        return "_result_or_error" in vars(self)

    def result(self) -> dict[str, Any]:
        """Return what ``run_job`` of engine.py returns.

        Raises:
            EngineError: the engine failed, in this call or in an earlier one.
        """
        if isinstance(self._result_or_error, EngineError):
            raise self._result_or_error
        return self._result_or_error

    def refusal(self, feature: str | None = None) -> str | None:
        """Return why the engine is made without a feature, or did not start because its options can't be used."""
        error = self._result_or_error
        return refusal_in(error) if isinstance(error, EngineError) else error.get("refused", {}).get(feature)

    def environment(self) -> dict[str, str]:
        """Return the environment of engine.py and the steps by their graphs; of a failed engine, the reason alone."""
        try:
            return self.result()["environment"] | {"steps by graphs": by_mode(self.graphs())}
        except EngineError as error:
            return {"failed": str(error).splitlines()[0]}

    def graphs(self, batches: Iterable[str] | None = None) -> Counter[str]:
        """Count the steps of these batches, or of all, by the mode of their CUDA graphs (raises EngineError)."""
        found = self.result()["batches"]
        return sum((Counter(found[name]["graphs"]) for name in batches or found), Counter())

    def outputs(self, batch: str) -> list[dict[str, Any]]:
        """Return the outputs of a batch's prompts (raises EngineError)."""
        return self.result()["batches"][batch]["outputs"]


def refusal_in(error: EngineError) -> str | None:
    """Return what was refused, where an engine failed because options can't be used with its model."""
    found = (line.rpartition("Error: ")[2].strip() for line in str(error).splitlines())
    return next((line for line in found if " is refused: " in line), None)


def by_mode(steps: Counter[str]) -> str:
    """Return steps by the mode of their CUDA graphs: "31 FULL + 1 NONE"."""
    return " + ".join(f"{count} {mode}" for mode, count in steps.most_common()) or "none"


def run_engine(job: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """Run a job of engine.py in a process.

    Raises:
        EngineError: the process fails, or takes longer than ``TIMEOUT`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="starling-selftest-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        own = {name: value for name, value in os.environ.items() if name not in COUNTERS}
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | own | QUIET | ONE_PROCESS | env
        return read_result(
            "the engine's process", ["-m", "starling.lab.selftest.engine", str(path)], TIMEOUT, environment
        )


def read_result(what: str, arguments: Sequence[str], timeout: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Return what a process of this Python prints behind ``RESULT``, as JSON.

    Args:
        what: description for messages of what runs in it.
        timeout: maximum run time, in seconds.

    Raises:
        EngineError: it fails, or prints no result, with the last lines that it printed; or it takes too long.
    """
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{what} did not finish in {timeout} seconds") from error
    if done.returncode:
        raise EngineError(f"{what} ended with {done.returncode}:\n{last_lines(done.stdout + done.stderr)}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        raise EngineError(f"{what} ended without a result:\n{last_lines(done.stdout)}")
    return json.loads(lines[-1].removeprefix(RESULT))


def last_lines(printed: str) -> str:
    return "\n".join(printed.strip().splitlines()[-12:])
