"""Goodput over the request rate, dense and star, by vLLM's own tools: `python -m benchmarks.goodput`.

`vllm bench sweep serve` starts one server of a random Llama, and runs `vllm bench serve` against it with each request
rate, without and with star options in its `--extra-body`. Goodput is the number of requests a second whose first token
and whose later tokens come in time (`--goodput`). The sweep needs pandas, which `make bench` puts into build/bench.
Writes results/goodput.json and .png. Takes some 10 minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.random_llama import byte_tokenizer, make_random_llama
from benchmarks.report import saved_figure, write_json
from benchmarks.star_ttft import RANDOM_LLAMA
from examples.server import ENVIRONMENT, free_ports

STAR = {"vllm_xargs": {"star": "on", "star_block_size": "n/16"}}
MODES: dict[str, dict[str, Any]] = {"dense": {}, "star": STAR}
FIGURES = {
    "request_goodput": "goodput",
    "request_throughput": "throughput",
    "median_ttft_ms": "TTFT, median",
    "p99_ttft_ms": "TTFT, p99",
    "median_tpot_ms": "TPOT, median",
}
"""Fields of vLLM's report that are kept, and their titles. Rates are requests a second, times milliseconds."""


def runs_of(rates: list[float], prompts: int) -> list[dict[str, Any]]:
    """Return the parameters of each run of `vllm bench serve`, in the sweep's format. Runs have different prompts.

    Answers are of letters. Other bytes may be parts of a character, whose text the server holds back until it is whole.
    """
    letters = byte_tokenizer().convert_tokens_to_ids(list(ascii_lowercase))
    return [
        {
            "_benchmark_name": f"{mode}, {rate}",
            "request_rate": rate,
            "num_prompts": prompts,
            "seed": seed,
            "extra_body": json.dumps(body | {"allowed_token_ids": letters}),
        }
        for seed, (rate, (mode, body)) in enumerate((rate, item) for rate in rates for item in MODES.items())
    ]


def sweep(model: Path, folder: Path, args: argparse.Namespace) -> None:
    """Run the sweep; its results are under ``folder``/sweep.

    Raises:
        subprocess.CalledProcessError: the server does not start, or a run fails.
    """
    (port,) = free_ports(0)
    vllm = str(Path(sys.executable).with_name("vllm"))
    serve = [vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    serve += ["--enforce-eager", "--max-num-batched-tokens", "2048", "--max-model-len", str(2 * args.tokens)]
    serve += ["--additional-config", json.dumps({"starling": {}})]
    bench = [vllm, "bench", "serve", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    bench += ["--dataset-name", "random", "--random-input-len", str(args.tokens), "--random-output-len", str(args.new)]
    bench += ["--ignore-eos", "--goodput", f"ttft:{args.ttft_ms}", f"tpot:{args.tpot_ms}"]
    parameters = folder / "runs.json"
    parameters.write_text(json.dumps(runs_of(args.rates, args.prompts)))
    command = [vllm, "bench", "sweep", "serve", "--serve-cmd", shlex.join(serve), "--bench-cmd", shlex.join(bench)]
    command += ["--bench-params", str(parameters), "--num-runs", str(args.runs), "--server-ready-timeout", "1200"]
    command += ["--output-dir", str(folder), "--experiment-name", "sweep"]
    subprocess.run(command, check=True, env=ENVIRONMENT | os.environ, stdout=subprocess.DEVNULL)


def read(folder: Path) -> list[dict[str, Any]]:
    """Read a row for each mode and request rate, with the figures of each run, of a sweep's folder."""
    rows = []
    for path in folder.rglob("summary.json"):
        runs = json.loads(path.read_text())
        row = {"mode": runs[0]["_benchmark_name"].split(",")[0], "rate": float(runs[0]["request_rate"])}
        row |= {figure: [run[figure] for run in runs] for figure in FIGURES}
        rows.append(row | {"failed": sum(run["failed"] for run in runs)})
    return sorted(rows, key=lambda row: (row["rate"], row["mode"]))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("requests/s", "mode", *FIGURES.values(), "failed", title="medians over runs; times in ms")
    for row in rows:
        figures = (f"{median(row[figure]):.4g}" for figure in FIGURES)
        table.add_row(f"{row['rate']:g}", row["mode"], *figures, str(row["failed"]))
    Console(width=110).print(table)


def plot(rows: list[dict[str, Any]], limits: str, path: Path) -> None:
    with saved_figure(path, figsize=(6, 4)) as (_, axis):
        for mode in MODES:
            of_mode = [row for row in rows if row["mode"] == mode]
            rates = [row["rate"] for row in of_mode]
            axis.plot(rates, [median(row["request_goodput"]) for row in of_mode], marker="o", label=mode)
        axis.plot(rates, rates, color="grey", linewidth=0.8, linestyle="dashed", label="all requests in time")
        axis.set_xlabel("requests sent a second")
        axis.set_ylabel(f"requests a second in time\n({limits})")
        axis.set_ylim(bottom=0)
        axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt (%(default)s)")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.6, 0.8], help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="requests of a run (%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="of each rate and mode (%(default)s)")
    parser.add_argument("--ttft-ms", type=float, default=6000, help="limit of the first token (%(default)s)")
    parser.add_argument("--tpot-ms", type=float, default=1000, help="limit of a later token, a mean (%(default)s)")
    args = parser.parse_args()
    if importlib.util.find_spec("pandas") is None:
        parser.error("vLLM's sweep needs pandas: use `make bench NAMES=goodput`, which installs it into build/bench")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        sweep(make_random_llama(folder / "llama", **RANDOM_LLAMA), folder, args)
        rows = read(folder / "sweep")
    show(rows)
    settings = {name: value for name, value in vars(args).items() if name != "rates"}
    path = write_json("goodput", {"settings": settings, "star": STAR, "rows": rows})
    limits = f"first token {args.ttft_ms / 1000:g} s, later ones {args.tpot_ms / 1000:g} s"
    plot(rows, limits, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
