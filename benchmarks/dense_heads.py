"""Loss of star with dense heads, and its work: `python -m benchmarks.dense_heads models/NAME`.

Runs `starling eval` on one model and length: the paper's star blocks (A = B) at n/8 and n/16, and the default anchor
and overlap with shares of dense KV heads, whose scores the server knows or gets by --star-heads. Every loss is a ratio
to that of A = B at n/8, over the same prompts. Goes on where an earlier run of the same model and length ended. Writes
results/dense_heads_NAME_LENGTH.json, and draws all these files as results/dense_heads.png.

With --scores, it measures other scores than those that the server knows, such as scores from other prompts. Such a run
has a --label of its own, by which its results are named; they are not drawn.

With --adapter, a folder that `starling distil --for star` has made of the model, each plan is measured with the adapter
and without. Writes results/adapter_star_NAME_LENGTH.json and .png.
"""

from __future__ import annotations

import argparse
import json
import operator
from pathlib import Path
from typing import Any

from benchmarks.accuracy import ENGINE, QUERY_TOKENS, TASKS, evaluation, loss_ratios, plans, run_eval
from benchmarks.report import markdown_table, saved_figure, write_json
from starling.lab.evaluation.comparison import ALL
from starling.lab.evaluation.prompt_options import DENSE

FOLDER = Path(__file__).resolve().parent / "out" / "dense_heads"
PARTS = (8, 16)
SHARES = {8: (0.0, 0.05, 0.1, 0.2), 16: (0.0, 0.1, 0.2)}
STYLES = {
    "A = B": {"marker": "o", "color": "C0"},
    "n/8": {"marker": "D", "color": "C2"},
    "n/16": {"marker": "s", "color": "C1"},
}
ADAPTER = ", adapter"
FEW = {8: (0.0, 0.1), 16: (0.1, 0.2)}


def named_plans(length: int, few: bool) -> list[str]:
    """Return A = B at n/8 first, at n/16 too unless ``few``, and for each size of blocks the shares with an overlap."""
    found, shares = plans(length, list(PARTS)), FEW if few else SHARES
    overlap = zip(PARTS, found[1::2], strict=True)
    return [
        *found[: 1 if few else None : 2],
        *(f"{name},H={share:g}" for part, name in overlap for share in shares[part]),
    ]


def with_and_without(names: list[str]) -> list[str]:
    """Return each plan without the server's adapter, then each with it."""
    return [f"{name},L={use}" for use in ("off", "auto") for name in names]


def rows_of(results: dict[str, Any], ratios: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return plan -> its work as a share of dense's, its loss over that of A = B at n/8, and its cost in points."""
    cells = {cell["plan"]: cell for cell in results["cells"] if cell["task"] == ALL}
    return {
        ratio["other"]: {
            "attended_keys": cells[ratio["other"]]["attended_keys"],
            "kl": cells[ratio["other"]]["kl"],
            "kl_ratio": ratio["kl_ratio"],
            "logprob_ratio": ratio["logprob_ratio"],
            "score": cells[ratio["other"]]["score"],
            "difference": cells[ratio["other"]]["difference"],
        }
        for ratio in ratios
    }


def shown(name: str, length: int) -> tuple[str, str]:
    """Return a plan as people write it: ("n/8", "A = B"), ("n/16", "H = 0.1, adapter")."""
    sizes = dict(part.split("=") for part in name.split(","))
    heads = f"H = {sizes['H']}" if "H" in sizes else "A = B"
    return f"n/{length // int(sizes['B'])}", f"{heads}{ADAPTER if sizes.get('L') == 'auto' else ''}"


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a row for each plan, with its work, loss and points for each result; docs/dense-heads.md has some."""
    plans = sorted({shown(name, length_of(result)) for result in results for name in result["plans"]}, key=order)
    head, rows = ["plan"], [[", ".join(plan)] for plan in plans]
    for result in results:
        dense = next(cell["dense_score"] for cell in result["cells"] if cell["task"] == ALL)
        of = {shown(name, length_of(result)): row for name, row in result["plans"].items()}
        title = f"{result['model']}, {length_of(result):,} tokens, {result['prompts']} prompts"
        head.append(f"{title}, dense scores {100 * dense:.0f}")
        rows = [[*row, cell_of(of[plan]) if plan in of else ""] for row, plan in zip(rows, plans, strict=True)]
    return markdown_table(head, rows)


def cell_of(row: dict[str, Any]) -> str:
    work, points = 100 * row["attended_keys"], 100 * row["difference"]["mean"]
    return "{:.2f} [{:.2f}, {:.2f}]".format(*row["kl_ratio"]) + f", {work:.0f} %, {points:+.0f}"


def order(plan: tuple[str, str]) -> tuple[int, str]:
    return int(plan[0].removeprefix("n/")), plan[1]


def draw(axis: Any, result: dict[str, Any]) -> None:
    """Draw KL over work: a line for each size of blocks with an overlap, and the paper's plans as another."""
    axis.set_visible(True)
    length = result["setup"]["lengths"][0]
    lines: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in result["plans"].items():
        part, heads = shown(name, length)
        label = "A = B" if heads.startswith("A = B") else f"{part}, overlap"
        lines.setdefault(label + (ADAPTER if heads.endswith(ADAPTER) else ""), {})[name] = row
    for label, rows in sorted(lines.items()):
        work, kl = ([row[field] for row in rows.values()] for field in ("attended_keys", "kl_ratio"))
        error = [[mean - low for mean, low, _ in kl], [high - mean for mean, _, high in kl]]
        percent, means = [100 * share for share in work], [mean for mean, _, _ in kl]
        line = "--" if label.endswith(ADAPTER) else "-"
        axis.errorbar(percent, means, error, **STYLES[label.partition(",")[0]], linestyle=line, capsize=3, label=label)
        for x, mean, name in zip(percent, means, rows, strict=True):
            part, heads = shown(name, length)
            text = part if heads.startswith("A = B") else heads.removesuffix(ADAPTER)
            axis.annotate(text, (x, mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set_title(f"{result['model']}, {length:,} tokens, {result['prompts']} prompts", fontsize=10)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw a row for each length, a column for each model."""
    models, lengths = ({get(result): None for result in results} for get in (operator.itemgetter("model"), length_of))
    shape = {"rows": len(lengths), "columns": len(models), "squeeze": False, "sharex": True, "sharey": True}
    with saved_figure(path, **shape, figsize=(5.5 * len(models), 3.6 * len(lengths))) as (_, axes):
        for axis in axes.flat:
            axis.set_visible(False)
        for result in results:
            draw(axes[[*lengths].index(length_of(result))][[*models].index(result["model"])], result)
        for column in axes.T:
            last = [axis for axis in column if axis.get_visible()][-1]
            last.set_xlabel("attention work of the prefill, % of dense")
            last.tick_params(labelbottom=True)
        for row in axes:
            first = next(axis for axis in row if axis.get_visible())
            first.set_ylabel("KL to dense, A = B at n/8 is 1")
            first.tick_params(labelleft=True)
        axes[0][0].set_ylim(bottom=0)
        axes[0][0].legend()


def length_of(result: dict[str, Any]) -> int:
    return int(result["setup"]["lengths"][0])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt and its answer (%(default)s)")
    parser.add_argument("--prompts-per-cell", type=int, default=3, help="prompts of each task (%(default)s)")
    parser.add_argument("--few", action="store_true", help="only A = B at n/8, and the plans with the least loss")
    parser.add_argument("--tasks", default=TASKS, help="of `starling eval` (%(default)s)")
    parser.add_argument("--scores", type=Path, help="a file of scores, in place of those that the server knows")
    parser.add_argument("--label", help="ends the names of the results, which are not drawn; needed with --scores")
    parser.add_argument("--adapter", type=Path, help="measure each plan with this adapter and without")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more options of `starling serve`")
    args = parser.parse_args()
    if (args.scores is None) != (args.label is None):
        parser.error("--scores and --label go together")
    return args


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run `starling eval`, and return what is kept of its results. Raises SystemExit with its exit code if it fails."""
    serve = args.serve
    if args.scores is not None:
        serve = ["--star-heads", str(args.scores), *serve]
    names = named_plans(args.length, args.few)
    if args.adapter is not None:
        names, serve = with_and_without(names), ["--star-adapter", str(args.adapter), *serve]
    server = [str(args.model), *ENGINE, *serve]
    results, answers = run_eval(server, names, args.tasks, args.length, args.prompts_per_cell, folder)
    return evaluation(results) | {
        "model": args.model.name,
        "query_tokens": QUERY_TOKENS,
        "prompts": sum(answer.plan == DENSE.name for answer in answers),
        "plans": rows_of(results, loss_ratios(answers, [(names[0], name) for name in names])),
    }


def main() -> None:
    args = options()
    name = f"{args.model.name}_{args.length}"
    if args.adapter is not None:
        results = [measure(args, FOLDER / f"{name}_adapter")]
        path = write_json(f"adapter_star_{name}", results[0])
        plot(results, path.with_suffix(".png"))
    elif args.label is None:
        path = write_json(f"dense_heads_{name}", measure(args, FOLDER / name))
        stored = [json.loads(file.read_text()) for file in path.parent.glob("dense_heads_*.json")]
        results = sorted(stored, key=lambda one: (length_of(one), one["model"]))
        plot(results, path.parent / "dense_heads.png")
    else:
        results = [measure(args, FOLDER / f"{name}_{args.label}")]
        path = write_json(f"{args.label}_{name}", results[0])
    print(markdown(results))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
