"""Time to first token, dense against Star Attention, in one engine: `python -m benchmarks.star_ttft`.

Each repetition runs every configuration once, one after the other. A speed-up is the median of dense / star over the
repetitions. Writes results/star_ttft_{llama,smollm2}.json and .png. Takes about 25 minutes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.engine import ROOT, Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import numbers_table, saved_figure, write_json
from starling.attention_backends.star.model_heads import KNOWN
from starling.config.head_scores import HeadScores
from starling.config.star import StarOptions, parse_options
from starling.lab.statistics import median_ratio
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.plan import dense_keys, keys_attended

QUERY_TOKENS = 32
PAGE_SIZE = 128  # vLLM's default on CPU
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
RANDOM_LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
ENGINE = {
    "additional_config": {"starling": {}},
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 4,
}


HEADS = 0.1
SCORES = HeadScores(scores=((1.0,) + (0.0,) * 7,) * 2)
"""Of the random Llama: a tenth of its heads is one in each layer."""


def configurations(fixed_block: int | None, heads: bool) -> dict[str, dict[str, Any]]:
    """Return name -> options of its requests.

    Args:
        heads: True if the engine can have dense heads.
    """
    star = {"star": "on", "star_query_tokens": QUERY_TOKENS, "star_overlap_size": 0}
    options: dict[str, dict[str, Any]] = {"dense": {}}
    options |= {f"n/B = {blocks}": star | {"star_block_size": f"n/{blocks}"} for blocks in (4, 8, 16)}
    overlap = {"star": "on", "star_query_tokens": QUERY_TOKENS, "star_dense_heads": 0}
    options["n/B = 8, overlap"] = overlap | {"star_block_size": "n/8"}
    for blocks in (8, 16) if heads else ():
        options[f"n/B = {blocks}, dense heads"] = overlap | {
            "star_block_size": f"n/{blocks}",
            "star_dense_heads": HEADS,
        }
    if fixed_block is not None:
        options[f"B = {fixed_block}"] = star | {"star_block_size": fixed_block}
    return options


def measure(
    engine: Engine, length: int, options: dict[str, dict], repeats: int, vocabulary: int, scores: HeadScores
) -> dict[str, Any]:
    """Run every configuration ``repeats`` times on prompts of ``length`` random tokens."""
    facts = EngineFacts(PAGE_SIZE, find_heads=lambda: scores)
    tokens = random.Random(length)
    runs: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "attention_seconds": []} for name in options}
    for _ in track(range(repeats), description=f"{length:,} tokens"):
        ids = [tokens.randrange(vocabulary) for _ in range(length)]
        for name, extra_args in options.items():
            output = engine.generate(ids, extra_args)
            for figure in ("seconds", "attention_seconds"):
                runs[name][figure].append(output[figure])
    dense = runs["dense"]
    rows = []
    for name, run in runs.items():
        plan = decide(StarOptions(), parse_options(options[name]), PromptFacts(length), facts).plan
        keys = 1.0 if plan is None else dense_keys(plan.num_prompt_tokens) / keys_attended(plan)
        attention = median_ratio(dense["attention_seconds"], run["attention_seconds"])
        rows.append(
            {
                "configuration": name,
                "block_size": None if plan is None else plan.block_size,
                **run,
                "ttft_speedup": median_ratio(dense["seconds"], run["seconds"]),
                "attention_speedup": attention,
                "keys_ratio": keys,
                "attention_over_keys": attention / keys,
            }
        )
    return {"tokens": length, "rows": rows}


def show(title: str, results: list[dict]) -> None:
    columns = ("tokens", "configuration", "B", "TTFT s", "speed-up", "attention speed-up", "keys ratio")
    table = numbers_table(title, columns)
    for result in results:
        for row in result["rows"]:
            table.add_row(
                f"{result['tokens']:,}",
                row["configuration"],
                str(row["block_size"] or "-"),
                f"{min(row['seconds']):.2f}",
                f"{row['ttft_speedup']:.2f}x",
                f"{row['attention_speedup']:.2f}x",
                f"{row['keys_ratio']:.2f}",
            )
    Console().print(table)


def plot(title: str, results: list[dict], path: Path) -> None:
    with saved_figure(path, figsize=(6, 4.2)) as (_, axis):
        if len(results) == 1:
            rows = [row for row in results[0]["rows"] if row["block_size"]]
            axis.bar([row["configuration"] for row in rows], [row["ttft_speedup"] for row in rows])
        else:
            lengths = [result["tokens"] for result in results]
            for index, row in enumerate(results[0]["rows"]):
                if row["block_size"]:
                    speedups = [result["rows"][index]["ttft_speedup"] for result in results]
                    axis.plot(lengths, speedups, marker="o", label=row["configuration"])
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
            axis.set_xlabel("prompt tokens")
            axis.legend()
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_ylabel("time to first token, dense / star")
        axis.set_title(title, fontsize=10)


def report(name: str, title: str, results: list[dict]) -> None:
    show(title, results)
    path = write_json(name, {"title": title, "query_tokens": QUERY_TOKENS, "results": results})
    plot(title, results, path.with_suffix(".png"))
    print(path)


def random_llama(lengths: list[int], repeats: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model, path = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA), Path(directory) / "scores.json"
        path.write_text(SCORES.model_dump_json())
        arguments = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 30} | ENGINE
        arguments["additional_config"] = {"starling": {"star_heads": str(path)}}
        options = configurations(2048, heads=True)
        with Engine(model, timed_attention=True, **arguments) as engine:
            engine.generate([1] * 4096)
            results = [measure(engine, length, options, repeats, 256, SCORES) for length in lengths]
    report("star_ttft_llama", "random Llama, 2 layers, float32", results)


def smollm2(length: int, repeats: int) -> None:
    """Measure a real model, compiled as vLLM does by default.

    Where the processor has AMX, vLLM's dense attention uses it, and an engine for dense heads could not.
    """
    arguments = {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30, "enforce_eager": False} | ENGINE
    scores = HeadScores.model_validate_json((KNOWN / f"{SMOLLM2.name}.json").read_text())
    options = configurations(None, heads=not torch.cpu._is_amx_tile_supported())
    with Engine(SMOLLM2, timed_attention=True, **arguments) as engine:
        engine.generate([1] * 4096)
        results = [measure(engine, length, options, repeats, 40000, scores)]
    report("star_ttft_smollm2", f"SmolLM2-135M, bfloat16, {length:,} tokens", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [8192, 16384, 32768, 65536]
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths, help="prompt lengths of the random Llama")
    parser.add_argument("--smollm2-tokens", type=int, default=8064, help="prompt length of SmolLM2; 0: leave it out")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.smollm2_tokens:
        smollm2(args.smollm2_tokens, args.repeats)
    if args.lengths:
        random_llama(args.lengths, args.repeats)


if __name__ == "__main__":
    main()
