"""Servers with a library: over replicas, after SIGKILL during writes, on a disk that hangs, on a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks.random_llama import SPECIAL, make_tiny_llama
from examples.server import Server, serving
from examples.two_hosts import available
from starling.client import Client
from starling.features.library.core import PATIENCE_SECONDS
from starling.lab.evaluation.commands import warm
from tests.e2e.replicas import (
    ENGINE_OPTIONS,
    PAGE_SIZE,
    TOKENS,
    assert_same,
    complete,
    complete_on_one,
    computed,
    computed_since,
    metrics,
    options,
    random_prompt,
)
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

LENGTH, QUERY = 2088, 40
STAR = options(1, 256, QUERY) | {"star_anchor_size": 256}  # independent blocks, each of which is asked for
DENSE = {"star": "off"}
LAST_PAGES = QUERY + TOKENS - 1 + PAGE_SIZE
"""What is computed at most where all pages of a prompt are found."""
FULL_DISK = 'mount -t tmpfs -o size=1m,mode=755 none "$0" && head -c 700000 /dev/zero > "$0/of_others" && exec "$@"'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@contextlib.contextmanager
def library_server(
    model: Path, folder: Path, log: Path, *more: str, size: str = "64MiB", prefix: Sequence[str | Path] = ()
) -> Iterator[Server]:
    """A server with its files in ``folder``; ``more`` are options of `starling serve`."""
    given = [*ENGINE_OPTIONS, "--num-gpu-blocks-override", "800", "--star-library", f"{folder}:{size}", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a machine may have fewer cores than replicas
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use: 13 s
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /reset_prefix_cache
        with serving(model, *given, log=log, prefix=prefix) as server:
            yield server


def forget(server: Server) -> None:
    """Empty the engines' own caches, as soon as no request holds a page."""
    assert wait_until(lambda: not any(metrics(server, "vllm:num_requests_running").values()))
    request = urllib.request.Request(f"{server.http}/reset_prefix_cache", method="POST")
    urllib.request.urlopen(request, timeout=300).close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.bin"))


def bytes_of(path: Path) -> int:
    """Its size; 0 if it has just been removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def pages(length: int) -> int:
    return length // PAGE_SIZE


def written(folder: Path, number: int) -> bool:
    """Whether so many pages are in files, after a while."""
    return wait_until(lambda: len(files(folder)) >= number)


def test_parts_of_a_prompt_are_found_on_each_replica(model: Path, tmp_path: Path) -> None:
    with library_server(model, tmp_path / "pages", tmp_path / "log", "--data-parallel-size", "2") as server:
        prompt, star = random_prompt(1, LENGTH), options(2, 256, QUERY)
        before = computed(server, 2)
        first = complete(server, prompt, star)
        assert first[2]["replicas"] == 2
        assert min(computed_since(server, before)) > 256, "both have computed a part"
        assert_same(first, complete_on_one(server, prompt, star))
        assert written(tmp_path / "pages", pages(LENGTH))
        forget(server)
        before = computed(server, 2)
        again = complete(server, prompt, star)
        assert again[2]["replicas"] == 2
        assert_same(first, again)
        assert sum(computed_since(server, before)) <= 2 * LAST_PAGES


def test_a_server_that_is_killed_while_it_writes_and_a_disk_that_hangs(model: Path, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "pages", [random_prompt(seed, LENGTH) for seed in range(4)]
    with library_server(model, folder, tmp_path / "first") as server:
        answers = [complete(server, prompt, STAR) for prompt in prompts]
        assert written(folder, 4 * pages(LENGTH))
    shutil.rmtree(folder)
    with library_server(model, folder, tmp_path / "second") as server:
        for prompt in prompts:
            complete(server, prompt, STAR)
        kill(server)
    for path in files(folder)[::2]:  # what the kernel has not written when a machine ends
        path.write_bytes(path.read_bytes()[:1000])
    with library_server(model, folder, tmp_path / "third") as server:
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_same(complete(server, prompt, STAR), answer)
        dense = complete(server, prompts[1], DENSE)
        assert written(folder, 4 * pages(LENGTH) + pages(LENGTH - 256))
        replace_by_pipes(files(folder))
        # Host memory has the pages as well: only a new server reads files.
        with library_server(model, folder, tmp_path / "fourth") as hanging:
            started = time.monotonic()
            assert_same(complete(hanging, prompts[0], STAR), answers[0])
            assert time.monotonic() - started >= PATIENCE_SECONDS
            assert "pages of the library don't arrive: they are computed" in hanging.log.read_text()
            assert_same(complete(hanging, prompts[0], STAR), answers[0])
            assert_same(complete(hanging, prompts[1], DENSE), dense)
            assert "its pages in the library don't arrive: they are computed" in hanging.log.read_text()
            assert hanging.stop(60) == 0


def kill(server: Server) -> None:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.process.wait()


def replace_by_pipes(paths: Sequence[Path]) -> None:
    """FIFOs in place of files: who opens one to read it waits in the kernel, as for a disk that does not answer."""
    for path in paths:
        path.unlink()
        os.mkfifo(path)


@pytest.mark.skipif(not available(), reason="needs root and namespaces, for a disk of 1 MiB")
def test_a_full_disk_ends_no_request(model: Path, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "pages", [random_prompt(seed, LENGTH) for seed in range(3)]
    folder.mkdir()
    prefix = ["unshare", "--mount", "sh", "-c", FULL_DISK, folder]
    with library_server(model, folder, tmp_path / "log", size="64MiB:1MiB", prefix=prefix) as server:
        answers = [complete(server, prompt, STAR) for prompt in prompts]
        failed = "starling:library_failed_writes_total"
        assert wait_until(lambda: sum(metrics(server, failed).values()) > 0)
        log = server.log.read_text()
        assert "(the disk is full)" in log and "block I/O failed" not in log
        forget(server)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_same(complete(server, prompt, STAR), answer)
        assert server.process.poll() is None


def test_files_are_bounded_and_a_document_that_is_used_stays(model: Path, tmp_path: Path) -> None:
    """The first prompt is asked for in every round, from the engine's own memory: its pages are never read."""
    folder, prompts = tmp_path / "pages", [random_prompt(seed, LENGTH) for seed in range(10)]
    with library_server(model, folder, tmp_path / "log", size="64MiB:8MiB") as server:
        first = complete(server, prompts[0], STAR)
        assert written(folder, pages(LENGTH))
        for prompt in prompts[1:]:
            complete(server, prompt, STAR)
            assert_same(complete(server, prompts[0], STAR), first)
            assert wait_until(lambda: not metrics(server, "vllm:num_requests_running").get("0"))
            assert sum(map(bytes_of, files(folder))) <= 8 * 2**20
        assert sum(metrics(server, "starling:library_removed_files_total").values()) > 0
    with library_server(model, folder, tmp_path / "again", size="64MiB:8MiB") as server:
        before = computed(server, 1)
        assert_same(complete(server, prompts[0], STAR), first)
        assert sum(computed_since(server, before)) <= LAST_PAGES


HEAD = "You answer from these texts, and say so where they do not have the answer. " * 6
DOCUMENTS = [" ".join(f"{word} {number}" for number in range(60)) for word in ("one", "two", "three")]


def ask(server: Server, path: str, body: dict) -> list[dict[str, int]]:
    """Where the documents of a prompt came from."""
    data = json.dumps({"model": server.model, "max_tokens": 1} | body).encode()
    request = urllib.request.Request(f"{server.http}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.headers["x-starling-plan"])["document_sources"]


@pytest.mark.parametrize("segments", ["auto", SPECIAL])
def test_what_was_warmed_is_found_by_requests_as_users_send_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], segments: str
) -> None:
    """From a chat, or from a text with a token before each document; over HTTP and over gRPC."""
    (tmp_path / "docs.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in DOCUMENTS[:2]))
    (tmp_path / "head.txt").write_text(HEAD)
    with library_server(
        model, tmp_path / "pages", tmp_path / "log", "--star", "on", "--star-segments", segments
    ) as server:
        files = ["--documents", str(tmp_path / "docs.jsonl"), "--head", str(tmp_path / "head.txt")]
        assert warm.run(["--base-url", server.http, *files]) == 0
        assert "2 documents" in capsys.readouterr().out
        with Client(server.grpc) as client:
            (done,) = client.warm_documents(DOCUMENTS[2:], head=HEAD)
            assert done.tokens and not done.error
            (short,) = client.warm_documents(DOCUMENTS[2:], head="Short.")
            (again,) = client.warm_documents(DOCUMENTS[2:], head="Short.")
            assert short.source is not None and short.source.computed
            assert again.source is not None and not again.source.computed, "the head is shorter than a page"
        texts = [DOCUMENTS[number] for number in (2, 0, 1)] + ["Which number?"]
        messages = [{"role": "system", "content": HEAD}, *({"role": "user", "content": text} for text in texts)]
        if segments == "auto":
            sources = ask(server, "/v1/chat/completions", {"messages": messages})
        else:
            sources = ask(server, "/v1/completions", {"prompt": HEAD + "".join(segments + text for text in texts)})
        assert len(sources) == 3 and all(list(source) == ["memory"] for source in sources)
