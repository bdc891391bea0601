"""The cost in quality of Attamba's smaller cache: `python -m benchmarks.attamba.quality`.

The benchmark trains six small models with examples/train_attamba.py, each in minutes on one core per seed, and skips
finished runs. It writes results/attamba_quality.json and .png: validation bits per byte, bytes of the cache, and the
paper's figures. All models have equally many parameters, and all runs of a seed see the same tokens in the same order.
Two seeds show the noise. One model is a control: Attamba with a window as long as the sequence, which has the same
weights and mixers and drops no key.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.report import OUT, write_json
from examples.attamba_model import load_attamba
from examples.stdlib_text import Text, load_text, windows
from examples.train_attamba import KV_BYTES, parse, train

RUNS = Path(__file__).resolve().parents[2] / "build" / "attamba"
BASELINE = "transformer"
MODELS = {
    BASELINE: ["--model", "transformer"],
    "isokv4": ["--model", "transformer", "--kv-cut", "4"],
    "isokv8": ["--model", "transformer", "--kv-cut", "8"],
    "attamba-p4-l32": ["--chunk", "4", "--window", "32"],
    "attamba-p8-l16": ["--chunk", "8", "--window", "16"],
    "attamba-p4-l512": ["--chunk", "4", "--window", "512"],
}
PAPER = {
    "long runs": {BASELINE: 20.72, "attamba-p4-l32": 21.74, "attamba-p8-l16": 23.28},
    "equal-KV study": {"isokv4": 33.49, "attamba-p4-l8": 33.54, "isokv8": 36.73, "attamba-p8-l8": 34.30},
}
"""Wikitext perplexity that the authors report: 64 M parameters, trained with the mixing of the released code."""
PAIRS = {
    ("attamba-p4-l32", BASELINE): math.log(21.74, 20.72),
    ("attamba-p8-l16", BASELINE): math.log(23.28, 20.72),
    ("attamba-p4-l32", "isokv4"): math.log(33.54, 33.49),
    ("attamba-p8-l16", "isokv8"): math.log(34.30, 36.73),
    ("attamba-p4-l32", "attamba-p4-l512"): None,
    ("isokv4", BASELINE): None,
    ("isokv8", BASELINE): None,
}
"""Pairs of models to compare, and the paper's ratio of their log perplexities (its equal-KV study has L = 8)."""


def collect(seeds: list[int], only_present: bool, text: Text) -> dict[str, dict[int, dict[str, Any]]]:
    """The result.json of each run, by model and seed.

    Args:
        seeds: to train with.
        only_present: use finished runs only, train nothing.
        text: to train on.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in MODELS}
    for seed in seeds:
        for name, arguments in MODELS.items():
            path = RUNS / f"{name}-s{seed}"
            if not (path / "result.json").exists():
                if only_present:
                    continue
                train(parse([*arguments, "--seed", str(seed), "--out", str(path)]), text)
            results[name][seed] = json.loads((path / "result.json").read_text())
    return results


def summarise(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The row of a model: its size, its cache, its bits per byte."""
    first = next(iter(runs.values()))
    bits = {seed: run["bits_per_byte"] for seed, run in runs.items()}
    length, dim, layers = (first["settings"][name] for name in ("length", "dim", "layers"))
    cache_bytes = first["kv_bytes_per_token"] * length + first["kv_bytes_per_sequence"]
    return {
        "parameters": first["parameters"],
        "tokens": first["tokens"],
        "kv_bytes_per_token": first["kv_bytes_per_token"],
        "kv_bytes_per_sequence": first["kv_bytes_per_sequence"],
        # At most the bytes of all K|V rows: the window of the control holds every row once.
        "kv_bytes_of_training_length": min(cache_bytes, 2 * KV_BYTES * dim * layers * length),
        "bits_per_byte": bits,
        "mean_bits_per_byte": statistics.mean(bits.values()),
        "train_seconds": {seed: round(run["seconds"]) for seed, run in runs.items()},
    }


def load_logits(path: Path) -> Callable[[Tensor], Tensor]:
    """The exported checkpoint as a function from tokens (B, T) to logits."""
    if json.loads((path / "config.json").read_text())["model_type"] == "attamba":
        return load_attamba(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return lambda tokens: model(tokens).logits


@torch.inference_mode()
def bits_by_position(path: Path, text: Text, count: int, length: int) -> dict[str, float]:
    """Validation bits per byte of the exported checkpoint, by parts of the window: shows the effect of more context.

    Args:
        path: of the checkpoint.
        text: to validate on.
        count, length: number and tokens of the validation windows.
    """
    logits, losses = load_logits(path), []
    for part in windows(text.validation, count, length).split(8):
        losses.append(F.cross_entropy(logits(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none"))
    bits = torch.cat(losses).mean(0) / math.log(2)
    edges = [0, length // 16, length // 4, length // 2, length]
    parts = {f"{first} to {last - 1}": bits[first:last].mean().item() for first, last in pairwise(edges)}
    return parts | {"all": bits.mean().item()}


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each pair: bits of the first model over bits of the second, by seed, and the paper's ratio."""
    bits = {name: row["bits_per_byte"] for name, row in rows.items()}
    return {
        f"{name} over {other}": {
            "ours": {seed: bits[name][seed] / bits[other][seed] for seed in bits[name] if seed in bits[other]},
            "paper": paper,
        }
        for (name, other), paper in PAIRS.items()
        if name in bits and other in bits
    }


def keep_recorded(result: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """``result`` with the additional runs of a results file.

    Values of a single seed, bits by position and the history, stay those of the file.

    Raises:
        ValueError: the runs of the file have other settings.
    """
    if recorded["settings"] != result["settings"]:
        raise ValueError(f"recorded with {recorded['settings']}, not {result['settings']}")
    result = json.loads(json.dumps(result))  # makes the seeds strings, as in the file
    models = {}
    for name in MODELS:
        new, old = (each["models"].get(name) for each in (result, recorded))
        if new and old:
            by_seed = ("bits_per_byte", "train_seconds")
            models[name] = old | {key: old[key] | new[key] for key in by_seed}
            models[name]["mean_bits_per_byte"] = statistics.mean(models[name]["bits_per_byte"].values())
        elif new or old:
            models[name] = new or old
    histories = result["history_of_first_seed"] | recorded["history_of_first_seed"]
    ratios = compare(models)
    return result | {"models": models, "bits_ratio": ratios, "history_of_first_seed": histories}


def plot(rows: dict[str, dict[str, Any]], histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot bits per byte over the size of the cache, over positions, and over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    for index, (name, row) in enumerate(rows.items()):
        values = list(row["bits_per_byte"].values())
        style = {"color": f"C{index}", "marker": "o" if name.startswith("attamba") else "s"}
        left.plot([row["kv_bytes_of_training_length"]] * len(values), values, linestyle="", label=name, **style)
        spans = {span: bits for span, bits in row["bits_by_position"].items() if span != "all"}
        middle.plot(list(spans), list(spans.values()), **style)
        history = histories[name]
        right.plot([h["step"] for h in history], [h["validation"] for h in history], color=f"C{index}", label=name)
    left.set_xscale("log", base=2)
    left.set_xlabel("KV cache of a sequence of the training length, bytes (bf16)")
    left.set_ylabel("validation bits per byte, one mark per seed")
    middle.set_xlabel("position in the sequence (first seed)")
    middle.set_ylabel("validation bits per byte")
    right.set_xlabel("step (first seed)")
    right.set_ylabel("validation bits per byte, few windows")
    right.set_ylim(top=min(4.0, right.get_ylim()[1]))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def print_tables(rows: dict[str, dict[str, Any]], pairs: dict[str, dict[str, Any]]) -> None:
    """Print the rows of the models, and the ratios of the pairs."""
    table = Table(title="validation bits per byte")
    spans = list(next(iter(rows.values()))["bits_by_position"])[:-1]
    columns = ("model", "parameters", "KV per token", "per sequence", "bits, by seed", *(f"at {s}" for s in spans))
    for column in columns:
        table.add_column(column)
    for name, row in rows.items():
        bits = ", ".join(f"{value:.4f}" for value in row["bits_per_byte"].values())
        cache = (f"{row['kv_bytes_per_token']:,.0f}", f"{row['kv_bytes_per_sequence']:,}")
        by_position = (f"{row['bits_by_position'][span]:.3f}" for span in spans)
        table.add_row(name, f"{row['parameters']:,}", *cache, bits, *by_position)
    Console().print(table)
    for pair, ratio in pairs.items():
        ours = ", ".join(f"{value - 1:+.2%}" for value in ratio["ours"].values())
        print(f"bits, {pair}: {ours}" + (f" (paper {ratio['paper'] - 1:+.2%})" if ratio["paper"] else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only-present", action="store_true", help="tabulate finished runs, train none")
    parser.add_argument("--keep", action="store_true", help="also keep the runs of the results file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = load_text()
    results = {name: runs for name, runs in collect(args.seeds, args.only_present, text).items() if runs}
    if not results:
        raise SystemExit(f"no finished run under {RUNS}")
    rows = {name: summarise(runs) for name, runs in results.items()}
    recorded = json.loads((OUT / "attamba_quality.json").read_text()) if args.keep else {"models": {}}
    for name, runs in results.items():
        if name in recorded["models"]:
            continue
        seed, run = next(iter(runs.items()))
        sizes = run["settings"]["windows"], run["settings"]["length"]
        rows[name]["bits_by_position"] = bits_by_position(RUNS / f"{name}-s{seed}", text, *sizes)
    run = next(iter(next(iter(results.values())).values()))
    per_run = ("model", "chunk", "window", "kv_cut", "seed")
    result = {
        "settings": {key: value for key, value in run["settings"].items() if key not in per_run},
        "models": rows,
        "bits_ratio": compare(rows),
        "paper_perplexity": PAPER,
        "history_of_first_seed": {name: next(iter(runs.values()))["history"] for name, runs in results.items()},
    }
    if args.keep:
        result = keep_recorded(result, recorded)
    print_tables(result["models"], result["bits_ratio"])
    path = write_json("attamba_quality", result)
    plot(result["models"], result["history_of_first_seed"], OUT / "attamba_quality.png")
    print(f"{path} and {OUT / 'attamba_quality.png'}")


if __name__ == "__main__":
    main()
