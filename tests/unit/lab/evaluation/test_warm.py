"""`starling warm` against a server whose tokens are characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starling.lab.evaluation.commands import warm
from tests.unit.lab.evaluation.fake_server import FakeServer, served

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
    sent = [(body.get("prompt", ""), body.get("vllm_xargs", {})) for body in fake.completions]
    read = [(prompt if isinstance(prompt, str) else "".join(map(chr, prompt)), options) for prompt, options in sent]
    return [(prompt, options) for prompt, options in read if options.get("star") == "on"]


def of_server(segments: str) -> dict:
    return {"library": True, "star_segments": segments}


def test_each_text_is_computed_behind_the_head(tmp_path, capsys):
    arguments = write(tmp_path, [{"text": DOCUMENTS[0]}, DOCUMENTS[1], {"text": DOCUMENTS[2], "id": 3}, DOCUMENTS[1]])
    with served() as fake:
        assert warm.run(["--base-url", fake.url, *arguments, "--concurrency", "2"]) == 0
    assert sorted(prompt for prompt, _ in prompts(fake)) == sorted(f"{HEAD}{document}?" for document in DOCUMENTS)
    for prompt, options in prompts(fake):
        assert options["star_segments"] == [len(HEAD), len(prompt) - 1]
    assert fake.completions[-1]["vllm_xargs"] == {"star": "off"}, "so that the last pages are stored"
    assert "3 documents, 30 tokens, found by other prompts" in capsys.readouterr().out


def test_texts_without_a_head_are_in_their_prompt_twice(tmp_path):
    with served() as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, ["abcd"], head="")]) == 0
    assert prompts(fake) == [("abcdabcd?", {"star": "on", "star_segments": [0, 4, 8]})]


def test_documents_of_chats_are_messages(tmp_path):
    tool = {"role": "tool", "content": "a result"}
    head = json.dumps({"role": "user", "content": HEAD})
    with served(library=of_server("auto")) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, ["a text", tool])]) == 0
        assert warm.run(["--base-url", fake.url, *write(tmp_path, ["a text"], head=head)]) == 0
    sent = [body for body in fake.completions if "messages" in body]
    system = {"role": "system", "content": HEAD}
    text, question = ({"role": "user", "content": content} for content in ("a text", "?"))
    assert [body["messages"] for body in sent] == [
        [system, text, question],
        [system, tool, question],
        [{"role": "user", "content": HEAD}, text, question],
    ]
    assert all(body["vllm_xargs"] == {"star": "on"} for body in sent), "the server's star_segments"
    asked = fake.looked_up[2]  # of the server, of this way to have documents, and of the first one
    assert [message["content"] for message in asked["messages"]] == [HEAD, "a text", "Another document.", "Which one?"]


@pytest.mark.parametrize("head", [HEAD, ""])
def test_a_token_starts_each_document(tmp_path, head):
    with served(library=of_server("<sep>")) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, ["abc"], head=head)]) == 0
        assert warm.run(["--base-url", fake.url, *write(tmp_path, ["abc"]), "--segments", "<other>"]) == 0
    twice = "" if head else "<sep>abc"
    assert prompts(fake) == [
        (f"{head}{twice}<sep>abc<sep>?", {"star": "on"}),
        (f"{HEAD}<other>abc<other>?", {"star": "on", "star_segments": "<other>"}),
    ]


@pytest.mark.parametrize(
    ("library", "head", "code", "says"),
    [
        ({"star_segments": "auto", "library": False}, HEAD, 1, "the server has no library (--star-library)"),
        (of_server("auto"), "", 2, "head is missing: the first message of a chat is its head"),
        (of_server("off"), HEAD, 2, "segments='off' is refused: the server's requests have no documents by default"),
    ],
)
def test_a_server_or_a_command_that_can_warm_nothing_is_refused(tmp_path, capsys, library, head, code, says):
    with served(library=library) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS, head=head)]) == code
    assert says in capsys.readouterr().err
    assert not prompts(fake)


def test_a_document_that_another_prompt_does_not_find_is_a_failure(tmp_path, capsys):
    with served(cached=lambda tokens: 4) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS[:1])]) == 1
    out = capsys.readouterr().out
    assert "0 documents" in out and "line 1: another prompt finds only 4 of its 10 tokens" in out


def test_it_says_what_was_found(tmp_path, capsys):
    sources = [{"computed": 4, "storage": 6}, {"host": 2}]  # a long document has several blocks
    with served(sources=sources) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS[:2])]) == 0
    assert "8 computed, 4 in host memory, 12 in files" in capsys.readouterr().out


def test_a_document_that_is_refused_is_named_and_the_others_go_on(tmp_path, capsys):
    def fail(body):
        return (400, "too long") if DOCUMENTS[1] in "".join(map(chr, body["prompt"])) else None

    with served(fail=lambda body: (isinstance(body["prompt"], list) and fail(body)) or None) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS)]) == 1
    assert len(prompts(fake)) == 2
    assert "line 2: " in (out := capsys.readouterr().out) and "HTTP 400: too long" in out


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["not json"], "docs.jsonl, line 1: it is not JSON that can be read: Expecting value"),
        (['"fine"', '{"title": "x"}'], "docs.jsonl, line 2: there is no text"),
        (['{"text": ""}'], "line 1: there is no text"),
        (["3"], "line 1: there is no text"),
        ([""], "the file has no document"),
        (['"one\u2028line"', "3"], "line 2: there is no text"),
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
    assert "none.jsonl' can't be read" in capsys.readouterr().err


def test_a_server_without_starling_is_refused(tmp_path, capsys):
    with served(starling=False) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS)]) == 1
    assert "Starling is not activated" in capsys.readouterr().err


def test_a_server_that_fails_ends_it(tmp_path, capsys):
    with served(fail=lambda body: (500, "gone") if body.get("vllm_xargs", {}).get("star") == "on" else None) as fake:
        assert warm.run(["--base-url", fake.url, *write(tmp_path, DOCUMENTS), "--concurrency", "3"]) == 1
    assert "failed 4 times" in capsys.readouterr().err
