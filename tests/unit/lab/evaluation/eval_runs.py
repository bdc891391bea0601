"""Runs of `starling eval` against a server in this process, and its reports."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from starling.lab.evaluation.commands import eval as cli

TASKS = ("--tasks", "vt,niah_single_1", "--lengths", "2000,3000", "--prompts-per-cell", "3", "--plan", "n/8")


def knows(prompt: str, xargs: dict) -> str:
    """Dense finds all variables and passcodes; star finds passcodes only, and answers with HTML."""
    if "VAR" in prompt:
        found = re.findall(r"VAR (\w+)", prompt)
        return " ".join(dict.fromkeys(found))[:30] if xargs["star"] == "off" else "<script>alert(1)</script>"
    return " ".join(re.findall(r"\d{7}", prompt))


def evaluate(fake, out: Path, *options: str) -> int:
    return cli.run(["--base-url", fake.url, *(options or TASKS), "--out", str(out)])


class Page(HTMLParser):
    """The tags of a page, and everything that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.loads, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text.append(data)
