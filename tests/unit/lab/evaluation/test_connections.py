"""The client with proxies, keys, certificates, redirects, limits and answers of another form: on real connections."""

from __future__ import annotations

import asyncio
import http.server
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest

from starling.lab.evaluation import client as client_module
from starling.lab.evaluation import server_process
from starling.lab.evaluation.answers import ServerError
from starling.lab.evaluation.client import Client, is_this_machine
from starling.lab.evaluation.server_process import StartError
from starling.lab.evaluation.server_process import served as serving
from tests.unit.lab.evaluation.fake_server import listening, served
from tests.unit.lab.evaluation.test_runner import STAR, prompt, run

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@contextmanager
def answering(status: int):
    """(URL, paths) of a server that gives each request this status."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_POST = do_GET

    with listening(Handler) as url:
        yield url, paths


@contextmanager
def child():
    """A process that does nothing until the block ends."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def facts(url: str, **options):
    async def asked():
        async with Client(url, **options) as client:
            return await client.facts()

    return asyncio.run(asked())


def test_a_loopback_server_is_asked_directly_and_others_by_the_proxy(monkeypatch):
    with answering(403) as (proxy, paths), served() as fake:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        assert facts(fake.url).model == "fake"
        assert facts(fake.url.replace("127.0.0.1", "localhost")).model == "fake"
        assert paths == []
        with pytest.raises(ServerError, match="HTTP 403"):
            facts("http://server.invalid")
    assert paths == ["http://server.invalid/v1/models"]


def test_a_server_that_starts_is_asked_directly(monkeypatch, tmp_path):
    monkeypatch.setattr(server_process, "START_SECONDS", 0.2)
    with answering(200) as (proxy, asked), child() as process, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(StartError, match="did not answer"):
            server_process.wait_until_ready(process, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "log")
        assert asked == []
    monkeypatch.setattr(server_process, "START_SECONDS", 300)
    with answering(503) as (proxy, _), answering(200) as (ready, asked), child() as process:
        monkeypatch.setenv("http_proxy", proxy)
        server_process.wait_until_ready(process, ready, tmp_path / "log")
        assert asked == ["/health"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:1", True),
        ("http://127.8.0.1", True),
        ("http://[::1]:1", True),
        ("http://0.0.0.0:1", True),
        ("https://a.localhost", True),
        ("http://10.0.0.1", False),
        ("http://localhost.example", False),
    ],
)
def test_which_addresses_are_this_machine(url, expected):
    assert is_this_machine(url) == expected


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ALL_PROXY", "socks5h://127.0.0.1:1", "socks"),
        ("HTTP_PROXY", "ftp://127.0.0.1:1", "ftp"),
        ("SSL_CERT_FILE", "/none/such.pem", "No such file"),
    ],
)
def test_what_the_environment_makes_unusable_is_one_message(monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=r"base_url='http://server.invalid' can't be used: .*SSL_CERT_FILE") as refused:
        Client("http://server.invalid")
    assert reason in str(refused.value)
    if variable != "SSL_CERT_FILE":
        with served() as fake:
            assert facts(fake.url).model == "fake", "no proxy is needed on this machine"


@pytest.mark.parametrize("key", ["sk-secret\n", " sk-secret", "sk-sécret", "sk-\x7fsecret"])
def test_a_key_that_can_not_be_sent_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="the key of api_key is refused: not all of it is printable ASCII") as refused:
        Client("http://127.0.0.1:1", api_key=key)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_a_busy_server_is_asked_again_when_it_says(monkeypatch, status):
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    busy = [(status, "busy", {"retry-after": "7"}), (status, "busy", {"retry-after": "9999"}), (status, "busy")]
    failures = iter([None, *busy])
    with served(fail=lambda body: next(failures, None)) as fake:
        assert len(run(fake, [prompt("a" * 100)], plans=())) == 1
    assert pauses == [7.0, 60.0, 0.0]


def test_an_answer_that_takes_too_long_is_not_asked_for_again():
    go_on = threading.Event()
    asked: list[dict] = []

    def hang(body: dict) -> None:
        asked.append(body)
        if len(asked) > 1:
            go_on.wait(600)

    async def evaluated(url: str):
        async with Client(url, timeout=300) as client:
            await client.facts()
            client._http.timeout, client._timeout = httpx.Timeout(300, read=0.3), 0.3
            await client.complete([97] * 100, STAR, 1)

    with served(fail=hang) as fake:
        with pytest.raises(ServerError, match=r"/v1/completions did not answer within 0.3 s: give more with --timeout"):
            asyncio.run(evaluated(fake.url))
        go_on.set()
    assert len(asked) == 2


def test_more_than_a_hundred_prompts_run_at_the_same_time():
    reached = threading.Barrier(121)

    def fail(body: dict) -> None:
        if len(body["prompt"]) > 50:
            reached.wait(300)

    prompts = [prompt(chr(1000 + number) * 100) for number in range(120)]
    with served(fail=fail) as fake:
        thread = threading.Thread(target=run, args=(fake, prompts, ()), kwargs={"concurrency": 120})
        thread.start()
        reached.wait(300)
        thread.join()
    assert len(fake.completions) == 121


def test_a_redirect_is_no_answer():
    failures = iter([None, (307, "moved", {"location": "https://other/v1/completions"})])
    with (
        served(fail=lambda body: next(failures, None)) as fake,
        pytest.raises(ServerError, match="redirects to https://other/v1/completions: give that server as --base-url"),
    ):
        run(fake, [prompt("a" * 100)])


@pytest.mark.parametrize(
    "header", ["[]", "7", "{", "{}", "[" * 30_000], ids=["array", "number", "cut", "without attention", "deep"]
)
def test_a_plan_of_another_form_is_refused(header):
    with served(plan_header=header) as fake, pytest.raises(ServerError, match="does not answer as vLLM's") as failed:
        run(fake, [prompt("a" * 100)])
    assert header[:50] in str(failed.value)


def test_a_star_plan_without_its_numbers_is_refused(monkeypatch):
    with served() as fake, pytest.raises(ServerError, match="does not answer as vLLM's"):
        monkeypatch.setattr(
            fake, "plan", lambda tokens, xargs: {"attention": "star" if xargs["star"] == "on" else "dense"}
        )
        run(fake, [prompt("a" * 100)])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"replies": {"/v1/models": b"[" * 100_000}}, "does not answer as vLLM's OpenAI server does"),
        ({"replies": {"/v1/models": {"data": []}}}, "/v1/models names no model"),
        ({"headers": {"content-encoding": "gzip"}}, "compressed data that are damaged"),
    ],
)
def test_answers_of_another_form(settings, reason):
    with served(**settings) as fake, pytest.raises(ServerError) as failed:
        run(fake, [prompt("a" * 100)])
    assert reason in str(failed.value)


@pytest.mark.parametrize("version", [["0.32"], "0.32", 7, b"[" * 100_000])
def test_a_version_of_another_form_is_none(version):
    with served(replies={"/version": version}) as fake:
        assert facts(fake.url).version is None


def test_errors_name_the_prompt():
    def fail(body: dict) -> tuple | None:
        return (400, "too long") if len(body["prompt"]) > 150 else None

    with served(fail=fail) as fake, pytest.raises(ServerError, match=r"^the prompt b{200}: .* HTTP 400: too long"):
        run(fake, [prompt("a" * 100), prompt("b" * 200)])


def test_a_server_that_ends_in_the_middle_is_reported_with_its_log(tmp_path, monkeypatch):
    """The child stands in for `starling serve`: it writes to its log, and ends."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho the engine is out of memory\nexit 7\n")
    script.chmod(0o755)
    monkeypatch.setattr(server_process.sys, "executable", str(script))
    monkeypatch.setattr(server_process, "wait_until_ready", lambda process, base_url, log: process.wait())
    with pytest.raises(StartError) as failed, serving("some/model", [], tmp_path / "log") as url:
        facts(url)
    assert "ConnectError" in str(failed.value)
    assert "`starling serve` ended with exit code 7" in str(failed.value)
    assert str(failed.value).endswith("the engine is out of memory")


def test_a_second_interruption_kills_the_child(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        process_group=0,
    )
    process.stdout.readline()
    wait, calls = process.wait, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(*arguments)

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server_process.stop(process)
    assert process.returncode == -9
    process.stdout.close()
