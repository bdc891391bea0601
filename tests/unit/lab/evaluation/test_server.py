"""The server that `starling eval MODEL` starts for itself."""

from __future__ import annotations

import os
import time

import pytest

from starling.lab.evaluation import server_process
from starling.lab.evaluation.commands import eval as cli
from starling.lab.evaluation.store import locked
from tests.unit.lab.evaluation.eval_runs import TASKS

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_folder_in_use_is_refused_before_a_server_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(server_process.sys, "executable", "/bin/false")
    (tmp_path / "server.log").write_text("of the process that uses it")
    with locked(tmp_path):
        assert cli.run(["some/model", *TASKS, "--out", str(tmp_path)]) == 2
    assert "another process uses it" in capsys.readouterr().err
    assert (tmp_path / "server.log").read_text() == "of the process that uses it"


@pytest.mark.parametrize(
    ("variable", "target"), [("OPENAI_API_KEY", ("--base-url", "http://x")), ("VLLM_API_KEY", ("some/model",))]
)
def test_a_key_that_can_not_be_sent_is_refused_before_a_server_starts(tmp_path, monkeypatch, capsys, variable, target):
    monkeypatch.setattr(server_process.sys, "executable", "/bin/false")
    monkeypatch.setenv(variable, "very-secret\n")
    assert cli.run([*target, *TASKS, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"the key of {variable} is refused: not all of it is printable ASCII" in error and "secret" not in error


def test_a_server_that_ends_at_its_start_is_reported_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server_process.sys, "executable", "/bin/false")
    assert cli.run(["some/model", "--tasks", "vt", "--out", str(tmp_path)]) == 1
    assert "`starling serve` ended with exit code 1" in capsys.readouterr().err
    assert (tmp_path / "server.log").exists()


def test_the_child_is_stopped_when_the_block_ends(tmp_path, monkeypatch):
    """A child that ignores SIGTERM is killed."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntrap '' TERM\necho $$ \"$@\"\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(server_process.sys, "executable", str(script))
    monkeypatch.setattr(server_process, "STOP_SECONDS", 0.2)
    log = tmp_path / "log"

    def wait(process, base_url, path) -> None:
        while not log.read_text().endswith("\n"):
            time.sleep(0.01)

    monkeypatch.setattr(server_process, "wait_until_ready", wait)
    with server_process.served("some/model", ["--dtype", "float32"], log) as url:
        pid, *command = log.read_text().split()
    assert command[:3] == ["-m", "starling.engine_ext.serving.cli.ended_with_parent", str(os.getpid())]
    assert command[3:7] == ["serve", "some/model", "--dtype", "float32"]
    assert command[7:] == ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
