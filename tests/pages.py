"""What the Markdown pages of the repository have in them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

MARKDOWN = MarkdownIt("commonmark").enable("table")


def tokens(text: str) -> Iterator[Token]:
    """All tokens of a Markdown text, inline ones too."""
    for token in MARKDOWN.parse(text):
        yield token
        yield from token.children or ()


def fences(text: str) -> list[Token]:
    """All code blocks with fences."""
    return [token for token in tokens(text) if token.type == "fence"]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return [fence.content for fence in fences(text) if fence.info == language]


def servers(text: str) -> list[str]:
    """The arguments of each `starling serve` in a console block."""
    consoles = [code.replace("\\\n", " ") for code in blocks(text, "console")]
    return [found for code in consoles for found in re.findall(r"\$ .*?\bstarling serve ([^#\n]*)", code)]
