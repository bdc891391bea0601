"""What a search found: a JSON file with a version, the options to serve with, a table and an HTML page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from starling.lab.evaluation.plans import parse_plan
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.report import html_page, html_table, percent, points
from starling.lab.evaluation.tuning.candidates import served_options
from starling.lab.evaluation.tuning.search_options import MEASURES, Measure, MeasureName
from starling.lab.evaluation.tuning.tuner import Tuning
from starling.lab.statistics import CONFIDENCE, LOSSLESS_DRAWS, Interval, lower_bound, prompts_needed, upper_bound

VERSION = 1
COLUMNS = ("plan", "attention work", "prompts", "loss [95 %]", "result")
ABOUT_LOSSES = (
    "A loss is dense minus the plan, in points: 100 points are {meaning}. The limits in brackets are one-sided: each "
    "holds with 95 % for itself. They cover the chance in drawing these prompts, and nothing else: other texts can "
    'lose more. "Attention work" counts the query-key pairs of the prefill, as a share of dense\'s. Candidates are '
    "compared on one half of the prompts. The last row has the other half, by which no plan was chosen: only its "
    "limits hold with 95 %."
)


class Loss(Interval):
    """The mean loss over prompts; 1 is 100 points.

    Attributes:
        low, high: one-sided bounds, each with a confidence of 95 %.
    """

    prompts: int


class CandidateResult(BaseModel):
    """A plan that was tried.

    Attributes:
        options: of its requests.
        attended_keys: query-key pairs of the prefill as a share of dense's, the mean over all prompts.
        loss: on the search half, as far as it was measured; None where it was not.
        outcome: ``chosen``; ``dropped`` during the search; ``not needed``: it costs more than the chosen plan; ``not
            shown``: its upper bound is above the budget.
        dropped_after: prompts.
        reason: why it is not the chosen plan.
    """

    model_config = ConfigDict(frozen=True)

    plan: str
    options: dict[str, str | int]
    attended_keys: float
    loss: Loss | None
    outcome: Literal["chosen", "dropped", "not needed", "not shown"]
    dropped_after: int | None
    reason: str


class Chosen(BaseModel):
    """The plan that the search found.

    Attributes:
        confirmed: its loss on the held-out half.
        within_budget: whether the upper bound of ``confirmed`` is.
        flags: of `starling serve`.
        additional_config: of `vllm serve` and ``LLM``.
    """

    model_config = ConfigDict(frozen=True)

    plan: str
    attended_keys: float
    confirmed: Loss
    within_budget: bool
    flags: list[str]
    additional_config: dict[str, Any]


class Closest(BaseModel):
    """The plan that came closest to the budget, where none is within it.

    Attributes:
        prompts_needed: about how many prompts would show that the plan is within the budget, if others lose what these
            did; None: its mean loss is above the budget, or very many.
    """

    model_config = ConfigDict(frozen=True)

    plan: str
    loss: Loss
    prompts_needed: int | None


@dataclass(frozen=True)
class Word:
    """What a word of star_quality stands for on the user's prompts.

    Attributes:
        limit: the word by whose limit the plan was found: this one, or one that allows less.
        num_blocks: into how many star blocks a prompt is cut; 1: it is dense, since no plan is shown to be good enough.
        loss: on the held-out prompts; None where it is dense.
        closest: the plan that came closest, where it is dense.
    """

    limit: str
    num_blocks: int
    loss: Loss | None = None
    closest: Closest | None = None


class TuneReport(BaseModel):
    """What a search found; `tune.json`.

    Attributes:
        version: of this format. A field that is removed or changes its meaning raises it.
        created: UTC, ISO 8601.
        budget: of the mean loss; 1 is 100 points.
        options: of the command, as JSON.
        command: repeats the search.
        server: base URL, model, max_model_len, version of vLLM.
        page_size: tokens.
        prompts: how many were searched and held out, how many were equal to others and left out, their lengths, and how
            many of their tokens are texts that an earlier one has too (``repeats.repeated_tokens``).
        words: of `starling advise`: each word of star_quality, and what it stands for.
        looked_at: other plans under which held-out prompts had been measured in this folder before.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["starling-tune"] = "starling-tune"
    version: int = VERSION
    created: str
    measure: MeasureName
    budget: float
    confidence: float = CONFIDENCE
    options: dict[str, Any]
    command: str
    server: dict[str, Any]
    page_size: int
    prompts: dict[str, int]
    candidates: list[CandidateResult]
    chosen: Chosen | None
    closest: Closest | None
    words: dict[str, Word] = {}
    looked_at: list[str] = []

    @property
    def succeeded(self) -> bool:
        """Whether a plan is within the budget on both halves."""
        return self.chosen is not None and self.chosen.within_budget


def make_loss(losses: Sequence[float], measure: Measure) -> Loss:
    return Loss(
        prompts=len(losses),
        mean=float(np.mean(losses)),
        low=lower_bound(losses, measure.assumed_best(losses)),
        high=upper_bound(losses, measure.assumed_worst(losses)),
    )


def candidate_results(tuning: Tuning, measure: Measure) -> list[CandidateResult]:
    """A row for each candidate, the cheapest first."""
    rows, found = [], False
    for trial in tuning.trials:
        loss = make_loss(trial.losses, measure) if trial.losses else None
        outcome: Literal["chosen", "dropped", "not needed", "not shown"]
        if trial.dropped_after is not None:
            outcome, reason = "dropped", trial.reason
        elif trial is tuning.chosen:
            outcome, reason = "chosen", ""
        elif tuning.chosen is not None and found:
            outcome, reason = "not needed", f"{tuning.chosen.candidate.plan.name} costs no more"
        else:
            assert loss is not None
            outcome, reason = "not shown", f"it may lose {100 * loss.high:.1f}"
        found = found or trial is tuning.chosen
        rows.append(
            CandidateResult(
                plan=trial.candidate.plan.name,
                options=trial.candidate.plan.options,
                attended_keys=trial.candidate.cost,
                loss=loss,
                outcome=outcome,
                dropped_after=trial.dropped_after,
                reason=reason,
            )
        )
    return rows


def make_chosen(
    tuning: Tuning, measure: Measure, budget: float, prompts: Sequence[Prompt], entry: dict[str, Any]
) -> Chosen | None:
    """The plan of the search, with how to serve it; None where there is none.

    Args:
        entry: what Starling's entry in ``additional_config`` has beside the plan.
    """
    if tuning.chosen is None:
        return None
    candidate, confirmed = tuning.chosen.candidate, make_loss(tuning.held_out, measure)
    options = served_options(candidate.plan, min(len(prompt.token_ids) for prompt in prompts))
    return Chosen(
        plan=candidate.plan.name,
        attended_keys=candidate.cost,
        confirmed=confirmed,
        within_budget=confirmed.high <= budget,
        flags=server_flags(options),
        additional_config={"starling": options | entry},
    )


def server_flags(options: Mapping[str, Any]) -> list[str]:
    """Options of a server as words of its command line."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def make_closest(tuning: Tuning, measure: Measure, budget: float) -> Closest | None:
    """The plan with the lowest upper bound, or the one that was not confirmed; None where a plan is within budget."""
    if tuning.chosen is not None:
        name, losses = tuning.chosen.candidate.plan.name, tuning.held_out
        if make_loss(losses, measure).high <= budget:
            return None
    else:
        measured = [trial for trial in tuning.trials if trial.losses]
        best = min(measured, key=lambda trial: make_loss(trial.losses, measure).high)
        name, losses = best.candidate.plan.name, best.losses
    needed = prompts_needed(losses, measure.assumed_worst(losses), budget)
    return Closest(plan=name, loss=make_loss(losses, measure), prompts_needed=needed and 2 * needed)


def other_plans(measured: Sequence[str], tuning: Tuning) -> list[str]:
    """The plans of earlier searches that this one does not confirm; none where it looks at no held-out prompt."""
    if tuning.chosen is None:
        return []
    chosen = tuning.chosen.candidate.plan
    return [name for name in measured if parse_plan(name).options != chosen.options]


def table_rows(report: TuneReport) -> list[list[str]]:
    """The candidates, and behind them the chosen one on the held-out half, as texts for COLUMNS."""
    rows = []
    for row in report.candidates:
        after = f" after {row.dropped_after} prompts" if row.dropped_after is not None else ""
        result = f"{row.outcome}{after}" + (f": {row.reason}" if row.reason else "")
        loss = [str(row.loss.prompts), points(row.loss)] if row.loss else ["", ""]
        rows.append([row.plan, percent(row.attended_keys), *loss, result])
    if report.chosen is not None:
        found, loss = report.chosen, [str(report.chosen.confirmed.prompts), points(report.chosen.confirmed)]
        verdict = "confirmed" if found.within_budget else "not confirmed"
        rows.append([found.plan, percent(found.attended_keys), *loss, f"held-out prompts: {verdict}"])
    return rows


def summary(report: TuneReport) -> list[str]:
    """The result in sentences."""
    budget, found, closest = f"the budget of {100 * report.budget:g}", report.chosen, report.closest
    again = (
        [
            "Warning: held-out prompts have been measured in this folder before, under "
            f"{', '.join(report.looked_at)}. If those answers led to this search, the confidence is less than 95 %: "
            "use prompts that no search has seen."
        ]
        if report.looked_at
        else []
    )
    if found is not None and found.within_budget:
        rare = percent(min(LOSSLESS_DRAWS / (found.confirmed.prompts + 1), 1.0))
        caution = (
            [f"A kind of prompt that loses much more, and is at most {rare} of all prompts, may not be among these."]
            if MEASURES[report.measure].worst is None
            else []
        )
        return [
            f"{found.plan} loses {points(found.confirmed)} points of {report.measure} on {found.confirmed.prompts} "
            f"held-out prompts: within {budget}, with a confidence of 95 %.",
            f"It attends to {percent(found.attended_keys)} of the keys that dense attends to. Prompts shorter than "
            f"{report.prompts['shortest']} tokens stay dense: none was measured.",
            *caution,
            *again,
        ]
    assert closest is not None
    where = "not confirmed by the held-out prompts" if found is not None else "the closest"
    needed = (
        f"About {closest.prompts_needed} prompts would show it, if others lose what these do."
        if closest.prompts_needed
        else "More prompts would not show it: a larger budget or larger star blocks may."
    )
    return [
        f"No candidate is shown to be within {budget} with a confidence of 95 %.",
        f"{closest.plan} is {where}: it loses {points(closest.loss)} points of {report.measure} on "
        f"{closest.loss.prompts} prompts. {needed}",
        *again,
    ]


def how_to_serve(report: TuneReport, served: Sequence[str]) -> str:
    """The command that starts a server with the plan that was found.

    Args:
        served: the model, and further options of the server.
    """
    flags = report.chosen.flags if report.chosen else []
    return shlex.join(["starling", "serve", *served, *flags])


def html_report(report: TuneReport, served: Sequence[str]) -> str:
    """A page without scripts and links.

    Args:
        served: the model, and further options of the server.
    """
    serve = ""
    if report.chosen is not None and report.succeeded:
        config = json.dumps(report.chosen.additional_config)
        serve = (
            f"<pre>{escape(how_to_serve(report, served))}</pre><p>The same for <code>--additional-config</code> of "
            f"<code>vllm serve</code>:</p><pre>{escape(config)}</pre>"
        )
    about = ABOUT_LOSSES.format(meaning=MEASURES[report.measure].meaning)
    return html_page(
        report,
        f"A star plan for {report.server['model']}",
        summary(report),
        f"{serve}<h2>Candidates</h2>{html_table(COLUMNS, table_rows(report))}<p>{escape(about)}</p>",
        "starling tune",
        {"options", "server", "page_size", "prompts"},
    )
