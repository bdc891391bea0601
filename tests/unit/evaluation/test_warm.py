"""`starling warm` against a server whose tokens are characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starling.evaluation.commands import warm
from tests.unit.evaluation.fake_server import MAX_MODEL_LEN, FakeServer, served

pytestmark = pytest.mark.usefixtures("surroundings")

HEAD = "You answer."
DOCUMENTS = ["one document", "another document", "the third"]


def write(folder: Path, lines: list[object], head: str = HEAD) -> list[str]:
    """The arguments that name these files."""
    (folder / "docs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "head.txt").write_text(head)
    return ["--documents", str(folder / "docs.jsonl"), *(["--head", str(folder / "head.txt")] if head else [])]


def prompts(fake: FakeServer) -> list[tuple[str, dict]]:
    """The prompts with documents, and their options."""
    sent = [("".join(map(chr, body["prompt"])), body.get("vllm_xargs", {})) for body in fake.completions]
    return [(prompt, options) for prompt, options in sent if options.get("star") == "on"]


def test_each_document_is_computed_behind_the_head(tmp_path, capsys):
    arguments = write(tmp_path, [{"text": DOCUMENTS[0]}, DOCUMENTS[1], {"text": DOCUMENTS[2], "id": 3}, DOCUMENTS[1]])
    with served() as fake:
        assert warm.run(["--base-url", fake.url, *arguments, "--concurrency", "2"]) == 0
    assert sorted(prompt for prompt, _ in prompts(fake)) == sorted(f"{HEAD}{document}?" for document in DOCUMENTS)
    for prompt, options in prompts(fake):
        assert options["star_segments"] == [len(HEAD), len(prompt) - 1]
    assert fake.completions[-1]["vllm_xargs"] == {"star": "off"}, "so that the last pages are stored"
    assert f"3 documents, {sum(map(len, DOCUMENTS))} tokens" in capsys.readouterr().out


def test_without_a_head_a_document_is_in_its_prompt_twice(tmp_path):
    with served() as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, ["abcd"], head="")]) == 0
    assert prompts(fake) == [("abcdabcd?", {"star": "on", "star_segments": [0, 4, 8]})]


def test_it_says_what_was_found(tmp_path, capsys):
    with served(sources=[{"computed": 4, "storage": 6, "host": 2}]) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS[:2])]) == 0
    assert "8 computed, 4 in host memory, 12 in files" in capsys.readouterr().out


def test_a_document_that_is_too_long_is_named_and_the_others_go_on(tmp_path, capsys):
    arguments = write(tmp_path, [DOCUMENTS[0], "x" * MAX_MODEL_LEN, DOCUMENTS[1]])
    with served() as fake:
        assert warm.run(["--base-url", fake.url, *arguments]) == 1
    assert len(prompts(fake)) == 2
    assert f"line 2: its prompt has {MAX_MODEL_LEN + len(HEAD) + 1} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["not json"], "docs.jsonl, line 1: Expecting value"),
        (['"fine"', '{"title": "x"}'], "docs.jsonl, line 2: there is no text"),
        (['{"text": ""}'], "line 1: there is no text"),
        (["3"], "line 1: there is no text"),
        ([""], "has no documents"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_sent(tmp_path, capsys, lines, says):
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    with served() as fake:
        assert warm.run(["--base-url", fake.url, "--documents", str(tmp_path / "docs.jsonl")]) == 2
        assert not fake.keys
    assert says in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    with served() as fake:
        assert warm.run(["--base-url", fake.url, "--documents", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl can't be read" in capsys.readouterr().err


def test_a_server_without_starling_is_refused(tmp_path, capsys):
    with served(starling=False) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS)]) == 1
    assert "Starling is not activated" in capsys.readouterr().err


def test_a_server_that_fails_ends_it(tmp_path, capsys):
    with served(fail=lambda body: (500, "gone") if body.get("vllm_xargs", {}).get("star") == "on" else None) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS), "--concurrency", "3"]) == 1
    assert "failed 4 times" in capsys.readouterr().err
