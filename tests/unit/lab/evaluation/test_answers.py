"""The client with servers that it can't trust: on real connections. Memory is that of Python's allocator."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import itertools
import json
import re
import sys
import time
import tracemalloc
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from starling.config.parsing import plain
from starling.lab.evaluation import client as client_module
from starling.lab.evaluation import server_process
from starling.lab.evaluation.answers import MAX_ANSWER_BYTES, MAX_MESSAGE, ServerError
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.commands import eval as eval_command
from tests.unit.lab.evaluation.fake_server import listening, served

MIB = 2**20
BOUND = f"answers with more than {MAX_ANSWER_BYTES} bytes, the bound MAX_ANSWER_BYTES"
HOSTILE = "\x1b[31mred\x1b[0m \x1b]0;title\x07\x9b2J\x90q\x9c\u202etext\u2069\r\x08\x7f\ud800 end"


@contextmanager
def sending(pieces, headers=()):
    """(URL, sent) of a server that answers each request with these pieces, as chunks. ``sent`` counts their bytes.

    It ends an answer once its client has left.
    """
    sent = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in (("transfer-encoding", "chunked"), *headers):
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = True
            try:
                for piece in filter(None, pieces()):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    sent[0] += len(piece)
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                return

        do_POST = do_GET

    with listening(Handler) as url:
        yield url, sent


def facts(url: str, **options):
    async def asked():
        async with Client(url, **options) as client:
            return await client.facts()

    return asyncio.run(asked())


def compressed(wbits: int) -> Iterator[bytes]:
    """A JSON text of 128 MiB in an eighth of one, piece by piece."""
    compressor = zlib.compressobj(wbits=wbits)
    yield compressor.compress(b'{"data": "')
    yield from (compressor.compress(b"a" * MIB) for _ in range(128))
    yield compressor.compress(b'"}')
    yield compressor.flush()


@pytest.mark.parametrize(
    ("coding", "wbits", "whole"),
    [("gzip", 31, False), ("deflate", 15, False), ("x-gzip", 31, True)],
    ids=["gzip", "deflate", "in one piece"],
)
def test_a_small_answer_that_decompresses_to_a_large_one_is_refused_at_the_bound(coding, wbits, whole):
    pieces = list(compressed(wbits))
    assert sum(map(len, pieces)) < MIB / 4
    pieces = [b"".join(pieces)] if whole else pieces
    with sending(lambda: pieces, [("content-encoding", coding)]) as (url, _):
        tracemalloc.start()
        try:
            with pytest.raises(ServerError, match=BOUND):
                facts(url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 * MAX_ANSWER_BYTES


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress"])
def test_an_answer_that_is_compressed_otherwise_than_asked_for_is_refused_unread(coding):
    with (
        sending(lambda: itertools.repeat(b"a" * MIB), [("content-encoding", coding)]) as (url, sent),
        pytest.raises(ServerError, match=rf"answers with content-encoding '{coding}'.* Allowed: gzip"),
    ):
        facts(url)
    assert sent[0] <= 32 * MIB  # what the sockets hold


@pytest.mark.parametrize(
    "headers",
    [[], [("content-encoding", "identity")], [("content-encoding", "gzip")]],
    ids=["as it is", "identity", "behind the end of compressed data"],
)
def test_an_answer_without_an_end_is_refused_at_the_bound(headers):
    first = [gzip.compress(b"{}")] if ("content-encoding", "gzip") in headers else []
    with (
        sending(lambda: itertools.chain(first, itertools.repeat(b"a" * MIB)), headers) as (url, sent),
        pytest.raises(ServerError, match=BOUND),
    ):
        facts(url)
    assert MAX_ANSWER_BYTES < sent[0] <= MAX_ANSWER_BYTES + 32 * MIB


def test_empty_blocks_of_compressed_data_without_an_end_are_refused_at_the_bound():
    head = zlib.compressobj(wbits=31).flush(zlib.Z_FULL_FLUSH)
    blocks = itertools.chain([head], itertools.repeat(b"\x00\x00\x00\xff\xff" * 2**18))
    with (
        sending(lambda: blocks, [("content-encoding", "gzip")]) as (url, _),
        pytest.raises(ServerError, match=BOUND),
    ):
        facts(url)


def test_bytes_that_come_one_by_one_are_no_answer_once_the_timeout_is_over():
    """Each byte comes before the timeout, and all of them together after it."""

    def slowly():
        for byte in b'{"data": []}':
            yield bytes([byte])
            time.sleep(0.2)

    with sending(slowly) as (url, _), pytest.raises(ServerError, match="/v1/models did not answer within 1 s"):
        facts(url, timeout=1)


def test_the_name_of_a_character_set_is_not_a_decompressor():
    body = zlib.compress(b"a" * 100 * MIB, 9)
    with sending(lambda: [body], [("content-type", "text/plain; charset=zlib")]) as (url, _):
        tracemalloc.start()
        try:
            with pytest.raises(ServerError, match="does not answer as vLLM's"):
                facts(url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 20 * MIB


@pytest.mark.parametrize(
    ("body", "reason"),
    [(gzip.compress(b"{}")[:-9], "end too early"), (b"none", "that are damaged")],
    ids=["cut", "of another form"],
)
def test_compressed_data_that_are_damaged_are_refused(body, reason):
    with sending(lambda: [body], [("content-encoding", "gzip")]) as (url, _), pytest.raises(ServerError, match=reason):
        facts(url)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read(coding):
    body = json.dumps({"data": []}).encode()
    body = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    with (
        sending(lambda: [body], [("content-encoding", coding)]) as (url, _),
        pytest.raises(ServerError, match="names no model"),
    ):
        facts(url)


def test_the_health_of_a_server_that_starts_is_read_from_its_status_alone(tmp_path):
    with sending(lambda: itertools.repeat(b"a" * MIB)) as (url, sent):
        process = type("Running", (), {"poll": lambda self: None})()
        server_process.wait_until_ready(process, url, tmp_path / "log")
    assert sent[0] <= 32 * MIB


def is_plain(text: str) -> bool:
    """Whether a text has no control but line feeds and tabs, no lone surrogate and no change of direction."""
    bad = {"Cc", "Cs", "Zl", "Zp", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    shown = set(text) - set("\n\t")
    return bad.isdisjoint(kind for c in shown for kind in (unicodedata.category(c), unicodedata.bidirectional(c)))


def test_plain_text_has_no_control_and_no_change_of_direction_and_keeps_the_others():
    every = list(map(chr, range(sys.maxunicode + 1)))
    assert is_plain(plain("".join(every)))
    assert [c for c in every if plain(c) != c] == [c for c in every if not is_plain(c)]
    assert plain(HOSTILE) == "red text  end"
    assert plain("a\r\nb\rc\x0bd\u2028e\n\tf") == "a\nb c d e\n\tf"
    assert plain("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\") == "link"
    assert plain("a\x90b\x1b]c\x1b") == "abc"
    assert plain("שלום‏ مرحبا, 世界 🙂 é") == "שלום‏ مرحبا, 世界 🙂 é"


@pytest.mark.parametrize(
    "settings",
    [
        {"fail": lambda body: (400, HOSTILE)},
        {"fail": lambda body: (400, HOSTILE * MIB)},
        {"fail": lambda body: (307, "", {"location": "http://other/\x1b[31m\x9b1m"})},
        {"replies": {"/v1/models": f"\x1b[2J{HOSTILE}".encode("utf-8", "replace")}},
        {"replies": {"/v1/models": {"data": [{"id": HOSTILE}, {"id": "other"}]}}},
        {"plan_header": json.dumps({"attention": HOSTILE})},
    ],
    ids=["error", "long error", "redirect", "no JSON", "names of models", "plan"],
)
def test_no_message_steers_the_terminal(settings, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)
    with served(**settings) as fake:
        arguments = ["--base-url", fake.url, "--tasks", "niah_single_1", "--lengths", "1024", "--out", str(tmp_path)]
        assert eval_command.run(arguments) == 1
    printed = "".join(capfd.readouterr())
    assert is_plain(printed)
    assert "starling eval: error: " in printed
    assert len(printed) < MAX_MESSAGE + 1000


def test_no_report_steers_the_terminal(tmp_path, capfd):
    """The name of a model, the version of vLLM and the answers, in the terminal and in each file of the results."""
    settings = {"models": (f"model{HOSTILE}",), "replies": {"/version": {"version": HOSTILE}}}
    answer = {"answer": lambda prompt, xargs: f"{HOSTILE}{xargs['star']}"}
    with served(**settings, **answer) as fake:
        arguments = ["--base-url", fake.url, "--tasks", "niah_single_1", "--lengths", "1024", "--plan", "n/4"]
        assert eval_command.run([*arguments, "--prompts-per-cell", "2", "--out", str(tmp_path)]) == 0
    printed = re.sub(r"\x1b\[\d*[A-Za-z]", "", "".join(capfd.readouterr()))
    assert json.loads((tmp_path / "results.json").read_text())["server"]["model"].startswith("modelred")
    for text in (printed, *(path.read_text() for path in tmp_path.iterdir() if path.suffix != ".png")):
        assert is_plain(text)
        assert "\\u001b" not in text
        assert "\\u202e" not in text
