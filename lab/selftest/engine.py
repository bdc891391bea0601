"""One vLLM engine in a process of its own: `python -m starling.lab.selftest.engine JOB.json` prints its results.

A job is {"engine": arguments of vllm.LLM, "batches": {name: [prompt, ...]}}. Batches run one after the other, the
prompts of a batch together. A prompt is {"ids", "max_tokens", "star": star options, "prompt_logprobs", "cold", "bare"}.
A cold prompt reads nothing from the prefix cache, and a bare one has no log-probabilities. The last line of standard
output has ``RESULT`` and then JSON.
"""

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

RESULT = "starling-selftest: "


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run the batches.

    Returns:
        {"environment", "batches": {name: {"outputs", "preemptions", "graphs", "memory"}}, "memory"}. "graphs" has the
        steps by the mode of their CUDA graphs, and "memory" what ``gpu_memory`` says of each rank: before all batches,
        and of each batch.
    """
    from vllm import LLM
    from vllm.v1.metrics.reader import Counter

    from starling.vllm_compat.metrics import count_graphs, gpu_memory

    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, cudagraph_metrics=True, seed=0, **job["engine"])
    graphs, memory = count_graphs(llm.llm_engine), llm.collective_rpc(gpu_memory)
    batches, before = {}, 0
    for name, prompts in job["batches"].items():
        outputs = run_batch(llm, prompts)
        counters = [metric for metric in llm.get_metrics() if isinstance(metric, Counter)]
        after = sum(counter.value for counter in counters if counter.name == "vllm:num_preemptions")
        taken = llm.collective_rpc(gpu_memory)
        batches[name] = {
            "outputs": outputs,
            "preemptions": after - before,
            "graphs": dict(graphs),
            "memory": taken,
        }
        graphs.clear()
        before = after
    return {"environment": environment(llm.llm_engine.vllm_config), "batches": batches, "memory": memory}


def run_batch(llm: Any, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Generate greedily for prompts together; the fields of ``read_output`` for each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=prompt["max_tokens"],
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=None if prompt.get("bare") else 2,
            prompt_logprobs=0 if prompt.get("prompt_logprobs") else None,
            skip_reading_prefix_cache=True if prompt.get("cold") else None,
            extra_args=prompt.get("star") or None,
        )
        for prompt in prompts
    ]
    tokens = [{"prompt_token_ids": prompt["ids"]} for prompt in prompts]
    return [read_output(output) for output in llm.generate(tokens, params, use_tqdm=False)]


def read_output(output: Any) -> dict[str, Any]:
    """Return tokens, log-probabilities and times of a request.

    ``margins`` has, for each generated token, how much more probable it is than the second best, in nats.
    ``adapter`` says whether the prompt ran with the server's, and ``stored`` how many tokens of documents came from its
    library.
    """
    (choice,) = output.outputs
    steps = list(zip(choice.logprobs, choice.token_ids, strict=True)) if choice.logprobs else []
    chosen = [step[token].logprob for step, token in steps]
    second = [max(entry.logprob for other, entry in step.items() if other != token) for step, token in steps]
    prompt = zip((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:], strict=False)
    times, count = output.metrics, len(choice.token_ids)
    plan, sources = getattr(output, "plan", None) or {}, getattr(output, "document_sources", None) or []  # not vLLM's
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": chosen,
        "margins": [best - other for best, other in zip(chosen, second, strict=True)],
        "prompt_logprobs": [step[token].logprob for step, token in prompt],
        "cached": output.num_cached_tokens,
        "adapter": bool(plan.get("adapter")),
        "stored": sum(document["host"] + document["storage"] for document in sources),
        "ttft": times.first_token_latency,
        "seconds_per_token": (times.last_token_ts - times.first_token_ts) / max(count - 1, 1),
    }


def environment(config: Any) -> dict[str, str]:
    """Return model runner, attention backend, KV layout, graph mode and dtypes of an engine."""
    from starling.vllm_compat.config import model_runner

    layers = config.compilation_config.static_forward_context
    backends = {layer.get_attn_backend().get_name() for layer in layers.values() if hasattr(layer, "get_attn_backend")}
    return {
        "runner": model_runner(config),
        "backend": ", ".join(sorted(backends)) or "in other processes",
        "layout": str(config.cache_config.kv_cache_layout),
        "graphs": "eager" if config.model_config.enforce_eager else config.compilation_config.cudagraph_mode.name,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_dtype": config.cache_config.cache_dtype,
        "page": f"{config.cache_config.block_size} tokens",
    }


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


if __name__ == "__main__":
    print("\n" + RESULT + json.dumps(run_job(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
