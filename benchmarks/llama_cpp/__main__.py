"""Time to first token and decode of llama.cpp, vLLM and Starling on CPU: `python -m benchmarks.llama_cpp`.

All run the same model on the same cores, one after the other in each round, on prompts of random tokens. llama.cpp runs
twice: with the matrices in bfloat16, as vLLM has them, and with the quantised file that the checkpoint was made from.
Its KV cache is in float16, which is its default, and it uses flash attention. `make bench-llama` builds llama.cpp into
build/llama, since it is no requirement of Starling. Writes results/llama_cpp.json and .png, or llama_cpp_eval for the
other model.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engine import ROOT, Child, Engine
from benchmarks.llama_cpp.gguf_files import original, to_bf16
from benchmarks.report import saved_figure, write_json
from examples import make_demo_model, make_eval_model
from examples.server import end_on_signals

BUILD = ROOT / "build" / "llama"
PYTHON = BUILD / "venv" / "bin" / "python"
CONTEXT, STEP_TOKENS, MICRO_BATCH = 8192, 2048, 512
RELEASES = {"demo": make_demo_model.RELEASE, "eval": make_eval_model.RELEASE}
NAMES = {"demo": "llama_cpp", "eval": "llama_cpp_eval"}
IDLE_SECONDS = 2
"""A pause after each prompt: a worker of vLLM keeps its core busy for a second after its last step."""

STAR = {"star": "on", "star_block_size": "n/8", "star_query_tokens": 32}
VLLM, DENSE, SPARSE = "vLLM", "Starling, dense", "Starling, star n/8"
BF16, QUANTISED = "llama.cpp, bfloat16", "llama.cpp, quantised"


class Way(Protocol):
    """A way to run a prompt."""

    def run(self, ids: list[int], new: int) -> dict[str, Any]:
        """Return {"first_token_seconds", "decode_tokens_per_second", "token_ids"} of a new prompt."""


class LlamaCpp(Child):
    """A process of benchmarks/llama_cpp/job.py, which starts on entry and stops on exit."""

    def __init__(self, model: Path, cpus: list[int]) -> None:
        job = {"model": str(model), "cpus": cpus, "context": CONTEXT, "batch": STEP_TOKENS}
        job |= {"micro_batch": MICRO_BATCH, "flash_attention": True}
        super().__init__("llama.cpp", [str(PYTHON), str(Path(__file__).with_name("job.py")), json.dumps(job)])

    def run(self, ids: list[int], new: int) -> dict[str, Any]:
        response = self.ask(ids=ids, max_tokens=new + 1)
        seconds = response["seconds"] - response["first_token_seconds"]
        return {
            "first_token_seconds": response["first_token_seconds"],
            "decode_tokens_per_second": new / seconds,
            "token_ids": response["token_ids"],
        }


class InEngine:
    """A way to run prompts in a vLLM engine that has a prefix cache."""

    def __init__(self, engine: Engine, extra_args: dict[str, Any] | None = None) -> None:
        self.engine, self.extra_args = engine, extra_args

    def run(self, ids: list[int], new: int) -> dict[str, Any]:
        # The second and the third time, the prompt is in the prefix cache. They differ by `new` steps of decode.
        first, long, short = (self.engine.generate(ids, self.extra_args, tokens) for tokens in (1, new + 1, 1))
        return {
            "first_token_seconds": first["seconds"],
            "decode_tokens_per_second": new / (long["seconds"] - short["seconds"]),
            "token_ids": long["token_ids"],
        }


@contextmanager
def ways(model: str, cpus: list[int]) -> Iterator[tuple[dict[str, Way], dict[str, Any]]]:
    """Yield all ways to run a prompt, by name, and what llama.cpp says of itself."""
    quantised = original(RELEASES[model], BUILD / "models")
    arguments: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 1 << 30,
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
        "enforce_eager": False,
    }
    bind = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))}
    checkpoint, activated = RELEASES[model].output, {"starling": {}}
    with (
        Engine(checkpoint, env=bind | {"VLLM_PLUGINS": ""}, **arguments) as plain,
        Engine(checkpoint, env=bind, additional_config=activated, **arguments) as starling,
        LlamaCpp(to_bf16(quantised), cpus) as bf16,
        LlamaCpp(quantised, cpus) as small,
    ):
        yield (
            {
                VLLM: InEngine(plain),
                DENSE: InEngine(starling),
                SPARSE: InEngine(starling, STAR),
                BF16: bf16,
                QUANTISED: small,
            },
            bf16.ready,
        )


def measure(by_name: dict[str, Way], lengths: list[int], new: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each length and way, with the figures of each round."""
    for way in by_name.values():
        way.run([1] * 1024, 4)
    rows = []
    for length in lengths:
        chance = random.Random(length)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in by_name}
        for index in track(range(rounds), description=f"{length:,} tokens"):
            ids = [chance.randrange(1000, 40000) for _ in range(length)]
            for name in list(by_name)[:: -1 if index % 2 else 1]:
                time.sleep(IDLE_SECONDS)
                runs[name].append(by_name[name].run(ids, new))
        for name, outputs in runs.items():
            pairs = zip(outputs, runs[VLLM], strict=True)
            same = sum(one["token_ids"][0] == other["token_ids"][0] for one, other in pairs)
            figures = ("first_token_seconds", "decode_tokens_per_second")
            row = {figure: [output[figure] for output in outputs] for figure in figures}
            rows.append({"tokens": length, "way": name, **row, "first_token_as_vllm": same})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("prompt tokens", "way", "first token, s", "decode, tokens/s", "first token as vLLM's")
    table = Table(*columns, title="medians")
    for row in rows:
        first, decode = (median(row[figure]) for figure in ("first_token_seconds", "decode_tokens_per_second"))
        rounds = len(row["first_token_seconds"])
        same = f"{row['first_token_as_vllm']} of {rounds}"
        table.add_row(f"{row['tokens']:,}", row["way"], f"{first:.2f}", f"{decode:.1f}", same)
    Console(width=110).print(table)


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    labels = {"first_token_seconds": "time to first token, s", "decode_tokens_per_second": "decode, tokens/s"}
    with saved_figure(path, 1, 2, figsize=(10, 4)) as (figure, axes):
        for axis, (name, label) in zip(axes, labels.items(), strict=True):
            for way in dict.fromkeys(row["way"] for row in rows):
                of_way = [row for row in rows if row["way"] == way]
                lengths = [row["tokens"] for row in of_way]
                axis.plot(lengths, [median(row[name]) for row in of_way], marker="o", label=way)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.minorticks_off()
            axis.set_xlabel("prompt tokens")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
        figure.suptitle(title, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RELEASES), default="demo", help="(%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8064], help="(%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens of decode (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--cpus", type=int, nargs="+", default=[0], help="one thread on each (%(default)s)")
    args = parser.parse_args()
    longest = CONTEXT - args.new - 1
    if max(args.lengths) > longest:
        parser.error(f"--lengths {max(args.lengths)}: the context is {CONTEXT:,} tokens. Allowed: up to {longest}.")
    if not PYTHON.exists():
        parser.error(f"{PYTHON.relative_to(ROOT)} does not exist: run `make bench-llama`, which builds llama.cpp")
    end_on_signals()  # so that a signal ends the engines too
    with ways(args.model, args.cpus) as (by_name, about):
        rows = measure(by_name, args.lengths, args.new, args.rounds)
    show(rows)
    title = f"{RELEASES[args.model].output.name}, {len(args.cpus)} thread{'s' if len(args.cpus) > 1 else ''}"
    settings = {"title": title, "cpus": args.cpus, "new_tokens": args.new, "star": STAR, "llama_cpp": about}
    path = write_json(NAMES[args.model], settings | {"rows": rows})
    plot(title, rows, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
