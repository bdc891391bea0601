"""What Attamba's smaller cache costs in quality: `python -m benchmarks.attamba_quality`.

Trains what is missing of six small models with examples/train_attamba.py, minutes of one core a model and seed, and
writes results/attamba_quality.json and .png: validation bits per byte beside the cache's bytes and the paper's figures.
All have as many parameters, and those of a seed see the same tokens in the same order; two seeds show what is noise.
One is a control: Attamba whose window is as long as the sequence, the same weights and mixers with nothing dropped.
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

RUNS = Path(__file__).resolve().parent.parent / "build" / "attamba"
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
"""Wikitext perplexity as the authors report it: 64 M parameters, trained with the released code's mixing."""
PAIRS = {
    ("attamba-p4-l32", BASELINE): math.log(21.74, 20.72),
    ("attamba-p8-l16", BASELINE): math.log(23.28, 20.72),
    ("attamba-p4-l32", "isokv4"): math.log(33.54, 33.49),
    ("attamba-p8-l16", "isokv8"): math.log(34.30, 36.73),
    ("attamba-p4-l32", "attamba-p4-l512"): None,
    ("isokv4", BASELINE): None,
    ("isokv8", BASELINE): None,
}
"""Bits of the first over bits of the second, and the paper's ratio of log perplexity (its equal-KV study has L = 8)."""


def collect(seeds: list[int], only_present: bool, text: Text) -> dict[str, dict[int, dict[str, Any]]]:
    """Model -> seed -> result.json of its run."""
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
    """A model's row: its size, its cache, its bits per byte."""
    first = next(iter(runs.values()))
    bits = {seed: run["bits_per_byte"] for seed, run in runs.items()}
    length, dim, layers = (first["settings"][name] for name in ("length", "dim", "layers"))
    held = first["kv_bytes_per_token"] * length + first["kv_bytes_per_sequence"]
    return {
        "parameters": first["parameters"],
        "tokens": first["tokens"],
        "kv_bytes_per_token": first["kv_bytes_per_token"],
        "kv_bytes_per_sequence": first["kv_bytes_per_sequence"],
        # No more than all K|V rows: the control's window holds every row once.
        "kv_bytes_of_training_length": min(held, 2 * KV_BYTES * dim * layers * length),
        "bits_per_byte": bits,
        "mean_bits_per_byte": statistics.mean(bits.values()),
        "train_seconds": {seed: round(run["seconds"]) for seed, run in runs.items()},
    }


def logits_of(path: Path) -> Callable[[Tensor], Tensor]:
    """The exported checkpoint as a function of tokens (B, T)."""
    if json.loads((path / "config.json").read_text())["model_type"] == "attamba":
        return load_attamba(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return lambda tokens: model(tokens).logits


@torch.inference_mode()
def bits_by_position(path: Path, text: Text, count: int, length: int) -> dict[str, float]:
    """Validation bits per byte of the exported checkpoint over parts of the window: does more context help?"""
    logits, losses = logits_of(path), []
    for part in windows(text.validation, count, length).split(8):
        losses.append(F.cross_entropy(logits(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none"))
    bits = torch.cat(losses).mean(0) / math.log(2)
    edges = [0, length // 16, length // 4, length // 2, length]
    parts = {f"{first} to {last - 1}": bits[first:last].mean().item() for first, last in pairwise(edges)}
    return parts | {"all": bits.mean().item()}


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each pair: bits of the first over bits of the second, by seed, and the paper's ratio."""
    bits = {name: row["bits_per_byte"] for name, row in rows.items()}
    return {
        f"{name} over {other}": {
            "ours": {seed: bits[name][seed] / bits[other][seed] for seed in bits[name] if seed in bits[other]},
            "paper": paper,
        }
        for (name, other), paper in PAIRS.items()
        if name in bits and other in bits
    }


def keep_recorded(found: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """``found`` with the runs that a file of results has and this machine has not.

    What is of one seed alone, bits by position and the history, stays that of the file.

    Raises:
        ValueError: the file's runs had other settings.
    """
    if recorded["settings"] != found["settings"]:
        raise ValueError(f"recorded with {recorded['settings']}, not {found['settings']}")
    found = json.loads(json.dumps(found))  # seeds as the file has them
    models = {}
    for name in MODELS:
        new, old = (each["models"].get(name) for each in (found, recorded))
        if new and old:
            by_seed = ("bits_per_byte", "train_seconds")
            models[name] = old | {key: old[key] | new[key] for key in by_seed}
            models[name]["mean_bits_per_byte"] = statistics.mean(models[name]["bits_per_byte"].values())
        elif new or old:
            models[name] = new or old
    histories = found["history_of_first_seed"] | recorded["history_of_first_seed"]
    ratios = compare(models)
    return found | {"models": models, "bits_ratio": ratios, "history_of_first_seed": histories}


def plot(rows: dict[str, dict[str, Any]], histories: dict[str, list[dict[str, float]]], path: Path) -> None:
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
    left.set_ylabel("validation bits per byte, a mark a seed")
    middle.set_xlabel("position in the sequence (first seed)")
    middle.set_ylabel("validation bits per byte")
    right.set_xlabel("step (first seed)")
    right.set_ylabel("validation bits per byte, few windows")
    right.set_ylim(top=min(4.0, right.get_ylim()[1]))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def show(rows: dict[str, dict[str, Any]], pairs: dict[str, dict[str, Any]]) -> None:
    table = Table(title="validation bits per byte")
    spans = list(next(iter(rows.values()))["bits_by_position"])[:-1]
    for column in ("model", "parameters", "KV a token", "a sequence", "bits, by seed", *(f"at {s}" for s in spans)):
        table.add_column(column)
    for name, row in rows.items():
        bits = ", ".join(f"{value:.4f}" for value in row["bits_per_byte"].values())
        held = (f"{row['kv_bytes_per_token']:,.0f}", f"{row['kv_bytes_per_sequence']:,}")
        table.add_row(
            name, f"{row['parameters']:,}", *held, bits, *(f"{row['bits_by_position'][s]:.3f}" for s in spans)
        )
    Console().print(table)
    for pair, ratio in pairs.items():
        ours = ", ".join(f"{value - 1:+.2%}" for value in ratio["ours"].values())
        print(f"bits, {pair}: {ours}" + (f" (paper {ratio['paper'] - 1:+.2%})" if ratio["paper"] else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only-present", action="store_true", help="tabulate the runs that are there, train none")
    parser.add_argument("--keep", action="store_true", help="keep the runs of the results file that are not here")
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
    own = ("model", "chunk", "window", "kv_cut", "seed")
    found = {
        "settings": {key: value for key, value in run["settings"].items() if key not in own},
        "models": rows,
        "bits_ratio": compare(rows),
        "paper_perplexity": PAPER,
        "history_of_first_seed": {name: next(iter(runs.values()))["history"] for name, runs in results.items()},
    }
    if args.keep:
        found = keep_recorded(found, recorded)
    show(found["models"], found["bits_ratio"])
    path = write_json("attamba_quality", found)
    plot(found["models"], found["history_of_first_seed"], OUT / "attamba_quality.png")
    print(f"{path} and {OUT / 'attamba_quality.png'}")


if __name__ == "__main__":
    main()
