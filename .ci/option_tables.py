"""Writes the tables of options in docs/*.md from the models of the options, between `<!-- options: NAME -->` markers.

`make option-tables` calls this script; tests/unit/test_docs.py fails where a table is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from starling.config.scheduling import ReplicaOptions, SchedulingOptions
from starling.config.star import SHARED, StarOptions, flat_name
from starling.engine_ext.serving.cli.serve_args import FLAGS, GROUPS, make_parser
from starling.scheduler.planning.rules import RULES, Rule

DOCS = Path(__file__).resolve().parent.parent / "docs"
PLACEHOLDERS = {
    "page": "the KV page",
    "block_size": "the star block",
    "model_tokens": "the model's length",
    "engine.replicas.size": "the number of replicas",
    "prompt.num_tokens": "the length of the prompt",
}
"""What a rule's ``allowed`` names in braces, in words."""

CODE = re.compile(r"--[a-z][a-z-]*|<\w+>|\b[A-Za-z]+_\w+(?:=\w+)?|\bstar=\w+|\bn/8\b|\bHOST:PORT\b")
END = re.compile(r"(.*?)(?: \([Dd]efault: (.*)\)| Default: (.*)\.)?$", re.DOTALL)
DEFAULT = re.compile(r"; default:? ")


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(row(cells) for cells in (columns, ["---"] * len(columns), *rows))


def coded(text: str) -> str:
    """Return a sentence in which names of options, and what stands for a value, are code."""
    return CODE.sub(lambda found: f"`{found[0]}`", text)


def shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def option_table(model: type[BaseModel], name_of: Callable[[str], str] = str) -> str:
    """Name, default and meaning of each field; a default that depends on the prompt is told in the description."""
    rows = []
    for field, info in model.model_fields.items():
        meaning, *told = DEFAULT.split(info.description or "", maxsplit=1)
        default = coded(told[0]) if told else "" if info.default in (None, "") else f"`{shown(info.default)}`"
        rows.append((f"`{name_of(field)}`", default, coded(meaning)))
    return table(("option", "default", "meaning"), rows)


def allowed_by(rule: Rule) -> str:
    """Return what a rule allows, in words; raises KeyError for a placeholder without words."""
    return coded(re.sub(r"\{([\w.]+)\}", lambda found: PLACEHOLDERS[found[1]], rule.allowed))


def refusal_table(rules: Iterable[Rule]) -> str:
    """Return the rules, one row for all that say the same of several options."""
    options: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        options.setdefault((rule.when, allowed_by(rule)), []).append(f"`{flat_name(rule.option)}`")
    rows = [(", ".join(names), when, allowed) for (when, allowed), names in options.items()]
    return table(("option", "refused where", "allowed"), rows)


def server_table() -> str:
    """Return what `starling serve` has beside the options of the other tables, with the words of its help."""
    told = {flag.dest for flag in FLAGS if flag.dest in SHARED or len(flag.path) > 1}
    [commands] = (action for action in make_parser()._actions if action.choices)
    rows = []
    for group in commands.choices["serve"]._action_groups:
        for action in group._group_actions if group.title in GROUPS else ():
            if action.dest not in told:
                choices = action.choices and "{" + ",".join(action.choices) + "}"
                value = (
                    ""
                    if action.nargs == 0
                    else f" {action.metavar or choices or action.dest.rpartition('_')[2].upper()}"
                )
                meaning, *defaults = END.match((action.help or "").replace("%(default).0s", "")).groups()
                default = next(filter(None, defaults), "none")
                rows.append((f"`{action.option_strings[0]}{value}`", coded(default), coded(meaning)))
    return table(("option", "default", "meaning"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "star": lambda: option_table(StarOptions, flat_name),
    "refusals": lambda: refusal_table(RULES),
    "scheduler": lambda: option_table(SchedulingOptions),
    "server": server_table,
    "replicas": lambda: option_table(ReplicaOptions),
}
MARKED = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- /options -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
