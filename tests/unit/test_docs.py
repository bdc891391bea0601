"""Links, commands and paths in the Markdown files, as GitHub shows them. `make docs` checks the links of the site."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections import Counter
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import markdown
import pytest

from starling.config.entry import parse_config
from starling.config.star import parse_options
from starling.engine_ext.serving.cli.main import COMMANDS
from starling.engine_ext.serving.cli.serve_args import parse
from tests.pages import MARKDOWN, blocks, servers, tokens

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", ".github/*.md", "docs/**/*.md", "examples/*.md", "examples/*/*.md")
PAGES = [path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown text."""
    found: dict[str, int] = {}
    blocks = MARKDOWN.parse(text)
    for before, token in pairwise(blocks):
        if before.type == "heading_open":
            words = "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))
            name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found[name] = found.get(name, -1) + 1
    return {f"{name}-{number}" if number else name for name, last in found.items() for number in range(last + 1)}


def broken_links(root: Path, page: str) -> list[str]:
    """The links of a page that lead nowhere. Of links to other sites, only the form is checked."""
    broken = []
    for token in tokens((root / page).read_text(encoding="utf-8")):
        link = str(token.attrGet("href") or token.attrGet("src") or "")
        parts = urlsplit(link)
        if parts.scheme:
            good = parts.scheme == "https" and "." in parts.netloc
        else:
            target = (root / page).parent / unquote(parts.path) if parts.path else root / page
            good = target.exists() and target.resolve().is_relative_to(root) and not link.startswith("/")
            if good and parts.fragment:
                good = target.suffix == ".md" and parts.fragment in anchors(target.read_text(encoding="utf-8"))
        if link and not good:
            broken.append(link)
    return broken


def commands(text: str) -> list[str]:
    """The commands in a Markdown text: inline code, and what follows a prompt in a console block."""
    found = []
    for token in tokens(text):
        if token.type == "code_inline":
            found.append(token.content)
        elif token.type == "fence" and token.info == "console":
            joined = token.content.replace("\\\n", " ")
            found += re.findall(r"^\S*\$ (.*)", joined, flags=re.MULTILINE)
    parts = [" ".join(part.split()) for command in found for part in re.split(r"&&|\||;", command)]
    return [re.sub(r"^(sudo |[A-Z_]+=\S+ )+", "", part) for part in parts]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def unknown_names(text: str) -> list[str]:
    """The make targets, Python modules, scripts and `starling` subcommands that commands name and that do not exist."""
    unknown = []
    for command in commands(text):
        if found := re.match(r"make((?: [a-z][\w-]*)+)", command):
            unknown += [f"make {target}" for target in found[1].split() if target not in make_targets()]
        elif found := re.match(r"(?:\S*/)?python3? -m ([\w.]+)", command):
            unknown += [f"python -m {found[1]}"] if not has_module(found[1]) else []
        elif found := re.match(r"(?:\S*/)?python3? (\S+\.py)", command):
            unknown += [f"python {found[1]}"] if not (ROOT / found[1]).is_file() else []
        elif found := re.match(r"(?:\S*/)?starling ([a-z][\w-]*)", command):
            unknown += [f"starling {found[1]}"] if found[1] not in COMMANDS else []
    return unknown


def unknown_paths(text: str) -> list[str]:
    """Inline code that looks like a path in a folder of the repository, where there is no such file or folder."""
    words = [token.content for token in tokens(text) if token.type == "code_inline"]
    paths = [word for word in words if re.fullmatch(r"[\w.-]+/[\w./*-]+", word)]
    made_here = ("build/", "dist/", "models/", "benchmarks/out")
    inside = [path for path in paths if not path.startswith(made_here) and (ROOT / path.split("/")[0]).is_dir()]
    return [path for path in inside if not any(ROOT.glob(path.rstrip("/")))]


def has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(ROOT, page) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page):
    assert unknown_names((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    assert unknown_paths((ROOT / page).read_text(encoding="utf-8")) == []


def ci_module(name: str) -> ModuleType:
    """A module of .ci, which is in no package."""
    spec = spec_from_file_location(name, ROOT / f".ci/{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def option_tables() -> ModuleType:
    return ci_module("option_tables")


@pytest.mark.parametrize("page", PAGES)
def test_python_in_pages_compiles(page):
    for code in blocks((ROOT / page).read_text(encoding="utf-8"), "python"):
        compile(code, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES)
def test_json_in_pages_parses(page):
    """A block is one value of JSON, or one in each line."""
    for code in blocks((ROOT / page).read_text(encoding="utf-8"), "json"):
        try:
            json.loads(code)
        except json.JSONDecodeError:
            for line in filter(None, code.splitlines()):
                json.loads(line)


def rendered(text: str) -> str:
    """A page as the site has it."""
    return markdown.markdown(text, extensions=["tables", "pymdownx.superfences"])


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(".github")])
def test_lists_and_tables_are_none_but_on_github(page):
    """Python-Markdown, which makes the site, wants four spaces of indentation, and an empty line before a list."""
    assert ci_module("docs_site").running_text(rendered((ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("- one\n- two\n\n1. one\n2. two\n\n| a |\n| --- |\n| - b |\n\n```\n- one\n```\n", []),
        ("- one\n\n    | a |\n    | --- |\n    | b |\n\n- two\n", []),
        ("- one\n\n  | a |\n  | --- |\n  | b |\n\n  more\n- two\n", ["- two</p>"]),
        ("- one\n\n  ```text\n  a\n  ```\n- two\n", ["- two</p>"]),
        ("a sentence:\n- one\n* two\n1. three\n", ["- one", "* two", "1. three</p>"]),
        ("- one\n  | a |\n  | --- |\n  | b |\n", ["  | a |", "  | --- |", "  | b |</li>"]),
        ("a sentence\n\n \\- one\n", ["<p>- one</p>"]),
    ],
)
def test_which_text_is_running_text(text, found):
    assert ci_module("docs_site").running_text(rendered(text)) == found


def test_the_tables_of_options_are_those_of_the_models():
    made, found = option_tables(), Counter()
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert made.with_tables(text) == text, f"{page.name} is out of date: run `make option-tables`"
        found.update(name for _, name, _ in made.MARKED.findall(text))
    assert found == Counter(made.TABLES.keys())


def test_what_a_rule_allows_is_told_in_words():
    assert not [rule for rule in option_tables().RULES if set("{}") & set(option_tables().allowed_by(rule))]


@pytest.mark.parametrize("page", PAGES)
def test_servers_and_requests_have_options_that_exist(page, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    for arguments in servers(text):
        parse(shlex.split(arguments))
    for entry in re.findall(r"""(\{"starling": \{[^'`]*\}\})['`]""", text):
        if "..." not in entry:
            parse_config(json.loads(entry))
    for options in re.findall(r'"vllm_xargs": (\{[^{}]*\})', text):
        if "..." not in options:
            parse_options(json.loads(options))


def test_all_pages_are_read():
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/grpc.md", "examples/README.md"} <= set(PAGES)


@pytest.mark.parametrize(
    ("link", "good"),
    [
        ("other.md", True),
        ("other.md#vllms-own-a--b-1", True),
        ("#here", True),
        ("folder/", True),
        ("https://arxiv.org/abs/2411.17116", True),
        ("none.md", False),
        ("other.md#vllms-own-a--b-2", False),
        ("#there", False),
        ("folder/file.txt#here", False),
        ("/other.md", False),
        ("../outside.md", False),
        ("http://arxiv.org/abs/2411.17116", False),
        ("https://arxiv", False),
    ],
)
@pytest.mark.parametrize("image", ["", "!"])
def test_which_links_are_broken(tmp_path, link, good, image):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "file.txt").touch()
    (tmp_path / "outside.md").touch()
    (root / "other.md").write_text("# `vLLM's` own: A / B\n\n## vLLM's own: A / B\n")
    (root / "page.md").write_text(f"# Here\n\n| a |\n| --- |\n| {image}[text]({link}) |\n")
    assert broken_links(root, "page.md") == ([] if good else [link])


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`make unit`, `make env demo-model`, `python -m benchmarks.star_ttft`, `starling doctor MODEL`", []),
        ("`starling.client`, `make`, `starling`, make nonsense, `starling --version`", []),
        ("```console\n$ make env && sudo make nonsense\n```", ["make nonsense"]),
        ("```console\nhost-a$ VLLM_HOST_IP=10.0.0.1 starling \\\n    nonsense\n```", ["starling nonsense"]),
        ("```console\nmake nonsense\n```", []),
        ("`.venv/bin/python -m benchmarks.nonsense.star`", ["python -m benchmarks.nonsense.star"]),
        ("`python examples/nonsense.py`", ["python examples/nonsense.py"]),
    ],
)
def test_which_names_are_unknown(text, unknown):
    assert unknown_names(text) == unknown


def test_which_paths_are_unknown():
    good = "`tests/unit/`, `docs/grpc.md`, `proto/starling/v1/*.proto`, `build/nonsense`, `vllm/v1`, docs/none.md"
    assert unknown_paths(f"{good}, `docs/none.md`, `tests/none/*.py`") == ["docs/none.md", "tests/none/*.py"]
