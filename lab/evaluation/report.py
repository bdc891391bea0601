"""The results: JSON with a version, tables in the terminal, a figure, and one HTML file that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.markup import escape as escape_markup
from rich.table import Table

from starling.lab.evaluation.comparison import ALL, Cell, Pair
from starling.lab.statistics import Interval

WORDS = {"B": "blocks of", "A": "anchor", "O": "overlap", "H": "dense heads", "Q": "query", "S": "documents at"}
"""Parts of a plan's name (lab/evaluation/prompt_options.py), in words."""
VERSION = 1
NUM_EXAMPLES = 10
TOO_HARD = 0.1  # a score of dense below which the summary warns
LEAST_PROMPTS = 10  # for a verdict: the interval of fewer ones leaves out what they happen not to have
COLUMNS = (
    *("task", "length", "plan", "sizes", "prompts"),
    *("dense", "score", "difference [95 %]", "same answer", "attention work"),
)
LEFT_COLUMNS = ("task", "depth", "plan", "sizes")
DEPTH_COLUMNS = ("depth", "length", "plan", "prompts", "dense", "score", "difference [95 %]")
ABOUT_RESULTS = (
    'Each prompt was answered with dense attention and with each plan by the same server. "Sizes" are those of the '
    "plan in tokens, as the server reported them: B of a star block, A of the anchor, O of the overlap, and a range "
    "where prompts had different ones. A score is RULER's, from 0 to 100 %. Differences are in points, with 95 % "
    'bootstrap intervals over prompts. "Attention work" counts the query-key pairs of the prefill, as a share of '
    "dense's. An interval covers the chance in drawing these prompts, and nothing else: other tasks and texts can "
    "differ."
)
LOGPROB_COLUMNS = ("log-probability [95 %]", "top-1", "KL")


class DifferentAnswer(BaseModel):
    """A prompt that a star plan answers otherwise than dense.

    Attributes:
        prompt_end: the last characters of the prompt.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    plan: str
    prompt_end: str
    references: tuple[str, ...]
    dense: str
    answer: str
    dense_score: float
    score: float


class Report(BaseModel):
    """Results of an evaluation; `results.json`.

    Attributes:
        version: version of this format. A field that is removed or changes its meaning raises it.
        created: UTC, ISO 8601.
        setup: description of what was measured (``EvalOptions.setup``).
        command: command line that repeats the evaluation.
        server: base URL, model, max_model_len, version of vLLM.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["starling-eval"] = "starling-eval"
    version: int = VERSION
    created: str
    setup: dict[str, Any]
    command: str
    server: dict[str, Any]
    cells: list[Cell]
    depths: list[Cell] = []
    different: list[DifferentAnswer]


def worst(pairs: Sequence[Pair], count: int = NUM_EXAMPLES) -> list[DifferentAnswer]:
    """Return the answers that differ from dense's, those that lose the most first."""
    differ = sorted((pair for pair in pairs if not pair.same), key=lambda pair: pair.difference)
    return [
        DifferentAnswer(
            prompt=pair.prompt.name,
            plan=pair.answer.plan,
            prompt_end=pair.prompt.end,
            references=pair.prompt.references,
            dense=pair.dense.text,
            answer=pair.answer.text,
            dense_score=pair.dense_score,
            score=pair.score,
        )
        for pair in differ[:count]
    ]


def overall(cells: Sequence[Cell]) -> list[Cell]:
    """Return, for each plan, the cells over all tasks; where a plan has none, its only cell of that kind."""
    found = [cell for cell in cells if cell.task == ALL]
    have = {(cell.plan, cell.against_reference) for cell in found}
    return found + [cell for cell in cells if cell.task != ALL and (cell.plan, cell.against_reference) not in have]


def summary(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence for each plan."""
    return [sentence(cell) for cell in overall(cells)]


def sentence(cell: Cell) -> str:
    """Return the content of a cell as a sentence."""
    over = f"over {cell.prompts} prompts"
    if cell.difference is None:
        found = f"Dense scores {percent(cell.dense_score)} {over}"
        unscored = f"Dense answers {cell.prompts} prompts without expected answers"
        return f"{found if cell.against_reference else unscored}. No star plan was measured."
    work = "" if cell.attended_keys is None else f", with {percent(cell.attended_keys)} of dense's attention work"
    if not cell.against_reference:
        apart = "" if cell.kl is None else f" Its distributions are {cell.kl:.4f} nats a token from dense's (KL)."
        equal = f"{percent(cell.score)} of {cell.prompts} prompts"
        return f"{cell.plan} gives dense's exact answer to {equal}{work}.{apart}"
    low, high = cell.difference.low, cell.difference.high
    verdict = "below dense" if high < 0 else "above dense" if low > 0 else "no measured difference to dense"
    if cell.prompts < LEAST_PROMPTS:
        verdict = "too few prompts for a verdict"
    too_hard = " Dense scores so little that there is little to lose." if cell.dense_score < TOO_HARD else ""
    return (
        f"{cell.plan} scores {percent(cell.score)} {over}, dense {percent(cell.dense_score)}: "
        f"{points(cell.difference)} points, {verdict}{work}.{too_hard}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(interval: Interval) -> str:
    """Return a difference of scores with its interval, in points of 100."""
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def nats(change: Interval | None) -> str:
    """Return a difference of log-probabilities with its interval; empty where there is none."""
    return f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" if change else ""


def table_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) as texts; the columns of --logprobs only where they were measured."""
    with_logprobs = any(cell.kl is not None for cell in cells)
    columns = [*COLUMNS, *(LOGPROB_COLUMNS if with_logprobs else ())]
    rows = []
    for cell in cells:
        row = [
            cell.task,
            f"{cell.length:,}" if cell.length else "",
            cell.plan,
            str(cell.sizes) if cell.sizes else "",
            str(cell.prompts),
            percent(cell.dense_score) if cell.against_reference else "",
            percent(cell.score) if cell.against_reference else "",
            points(cell.difference) if cell.difference and cell.against_reference else "",
            percent(cell.same_as_dense),
            "" if cell.attended_keys is None else percent(cell.attended_keys),
        ]
        if with_logprobs:
            row.append(nats(cell.logprob_difference))
            row.append("" if cell.top1_agreement is None else percent(cell.top1_agreement))
            row.append("" if cell.kl is None else f"{cell.kl:.4f}")
        rows.append(row)
    return columns, rows


def depth_rows(depths: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of the table by depth as texts."""
    with_logprobs = any(cell.logprob_difference for cell in depths)
    columns = [*DEPTH_COLUMNS, *(LOGPROB_COLUMNS[:1] if with_logprobs else ())]
    rows = []
    for cell in depths:
        length = f"{cell.length:,}" if cell.length else ""
        difference = points(cell.difference) if cell.difference else ""
        scores = [percent(cell.dense_score), percent(cell.score), difference]
        change = [nats(cell.logprob_difference)] if with_logprobs else []
        rows.append([cell.depth or "", length, cell.plan, str(cell.prompts), *scores, *change])
    return columns, rows


def terminal_tables(report: Report) -> list[Table]:
    """Return the tables for rich; that by depth only where prompts have one."""
    columns, rows = table_rows(report.cells)
    bold = [cell.task == ALL for cell in report.cells]
    tables = [terminal_table("Scores, and differences to dense in points", columns, rows, bold)]
    if report.depths:
        columns, rows = depth_rows(report.depths)
        tables.append(terminal_table("By the depth of the fact in the prompt", columns, rows))
    return tables


def terminal_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool] = ()
) -> Table:
    """Make a table of texts for rich.

    Args:
        bold: True for each bold row; by default none is.
    """
    table = Table(title=title)
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in LEFT_COLUMNS else "right"
        table.add_column(escape_markup(name), justify=justify)
    for row, is_bold in zip_longest(rows, bold):
        table.add_row(*map(escape_markup, row), style="bold" if is_bold else None)
    return table


def write_files(folder: Path, files: Mapping[str, str | bytes | None]) -> str:
    """Write files of results, and delete those that are None, of an earlier run; returns a line that names the rest."""
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return f"written to {folder}: {', '.join(name for name, content in files.items() if content is not None)}"


def html_report(report: Report, figure: bytes | None) -> str:
    """Return a page without scripts and links.

    Args:
        figure: the figure as PNG.
    """
    image = ""
    if figure is not None:
        data = base64.b64encode(figure).decode()
        image = f'<img alt="Differences to dense" src="data:image/png;base64,{data}">'
    depths = (
        "<h2>By depth</h2><p>Where in the text the fact begins that the answer needs: 0 % is the beginning. All tasks "
        f"with one such fact, each prompt with equal weight.</p>{html_table(*depth_rows(report.depths))}"
        if report.depths
        else ""
    )
    examples = "\n".join(map(html_example, report.different)) or "<p>No answer differs from dense's.</p>"
    folder = files(__package__)
    return Template(folder.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"Star Attention on {report.server['model']}"),
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        summary="\n".join(f"<p>{escape(text)}</p>" for text in summary(report.cells)),
        results=f"<p>{ABOUT_RESULTS}</p><h2>Results</h2>{html_table(*table_rows(report.cells))}{image}{depths}"
        f"<h2>Answers that lose the most</h2>{examples}",
        command=escape(report.command),
        created=escape(report.created),
        setup=escape(report.model_dump_json(indent=2, include={"setup", "server"})),
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""
    kinds = [' class="left"' if name in LEFT_COLUMNS else "" for name in columns]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for text, kind in zip(row, kinds, strict=True))

    head, body = cells("th", columns), "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def html_example(example: DifferentAnswer) -> str:
    """Return one answer beside dense's."""
    scores = "" if not example.references else f", {example.score:.2f} (dense {example.dense_score:.2f})"
    parts = [("End of the prompt", example.prompt_end), ("Dense", example.dense), (example.plan, example.answer)]
    if example.references:
        parts.insert(1, ("Expected", "\n".join(example.references)))
    shown = "".join(f"<dt>{escape(name)}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in parts)
    return f"<h3>{escape(example.prompt)}, {escape(example.plan)}{scores}</h3><dl>{shown}</dl>"


@dataclass(frozen=True)
class Panel:
    """One part of the figure.

    Attributes:
        label: label of the horizontal axis.
        equal: value of a plan that equals dense.
        values: values of the cells; an interval without width has no bar.
    """

    title: str
    label: str
    equal: float
    values: list[tuple[Cell, Interval]]


def make_panels(cells: Sequence[Cell]) -> list[Panel]:
    """Return the panels: differences of scores; without references the KL, or the share of equal answers."""
    scored: list[tuple[Cell, Interval]] = []
    equal: list[tuple[Cell, Interval]] = []
    apart: list[tuple[Cell, Interval]] = []
    for cell in cells:
        if cell.difference is None:
            continue
        if cell.against_reference:
            scored.append((cell, scaled(cell.difference, 100, 0)))
        elif cell.kl is not None:
            apart.append((cell, Interval(mean=cell.kl, low=cell.kl, high=cell.kl)))
        else:  # dense's score is 1
            equal.append((cell, scaled(cell.difference, 100, 100)))
    panels = [
        Panel(
            "Scores with star blocks, beside dense attention", "points above or below dense; 95 % intervals", 0, scored
        ),
        Panel("Answers that are dense attention's", "same answer as dense, %; 95 % intervals", 100, equal),
        Panel("How far probabilities are from dense attention's", "KL, nats for each token; 0: equal", 0, apart),
    ]
    return [panel for panel in panels if panel.values]


def scaled(interval: Interval, factor: float, offset: float) -> Interval:
    return Interval(**{name: offset + factor * value for name, value in interval})


def figure_png(cells: Sequence[Cell]) -> bytes | None:
    """Return the figure as PNG, or None without matplotlib, or without a star plan."""
    panels = make_panels(cells)
    if not panels or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    heights = [1.5 + 0.22 * len(panel.values) + 0.22 * len(rows_of(panel)) for panel in panels]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for panel, axes in zip(panels, parts[:, 0], strict=True):
        draw(panel, axes)
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=110)
    return output.getvalue()


def rows_of(panel: Panel) -> list[tuple[str, int | None]]:
    """Return the tasks and lengths of a panel."""
    return list(dict.fromkeys((cell.task, cell.length) for cell, _ in panel.values))


def draw(panel: Panel, axes: Any) -> None:
    """Draw a panel into matplotlib's axes."""
    rows = rows_of(panel)
    plans = list(dict.fromkeys(cell.plan for cell, _ in panel.values))
    for number, plan in enumerate(plans):
        found = [(rows.index((cell.task, cell.length)), value) for cell, value in panel.values if cell.plan == plan]
        heights = [row + 0.8 * (number + 0.5) / len(plans) - 0.4 for row, _ in found]
        means = [value.mean for _, value in found]
        bars = [[value.mean - value.low for _, value in found], [value.high - value.mean for _, value in found]]
        has_bars = any(value.low < value.high for _, value in found)
        axes.errorbar(means, heights, xerr=bars if has_bars else None, fmt="o", capsize=3, label=in_words(plan))
    axes.axvline(panel.equal, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{task} {length:,}" if length else task for task, length in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / len(rows) - 0.05), frameon=False)


def in_words(plan: str) -> str:
    """Return the name of a plan as a legend shows it: "blocks of 512, anchor 64, overlap 448"."""
    parts = []
    for part in plan.split(","):
        name, _, value = ("B", "=", part) if part.startswith("n/") else part.partition("=")
        if name == "B" and value.startswith("n/"):
            parts.append(f"blocks of 1/{value.removeprefix('n/')} of the prompt")
        elif part == "O=0":
            parts.append("no overlap")
        else:
            parts.append(f"{WORDS[name]} {value}" if name in WORDS else part)
    return ", ".join(parts)
