"""The `starling` command in an environment that has no vLLM yet."""

from __future__ import annotations

import json

import pytest

from starling.engine_ext.serving.cli import main, setup_cpu
from starling.lab.doctor import doctor as doctor
from starling.vllm_compat import versions


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    for module in (versions, setup_cpu):
        monkeypatch.setattr(module, "vllm_version", lambda: None)


def test_doctor_says_how_to_install_vllm(capfd):
    assert doctor.run(["--json"]) == 0
    installation = json.loads(capfd.readouterr().out)["installation"]
    assert installation["vllm"] is None
    assert "vLLM is not installed" in installation["problem"]
    assert "`starling setup-cpu`" in installation["problem"]


def test_doctor_with_a_model_is_one_line_and_exit_code_2(capsys):
    assert doctor.run(["model"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("starling doctor: error: vLLM is not installed")


def test_doctor_with_a_model_and_another_vllm_says_which_one_is_needed(capsys, monkeypatch):
    for module in (versions, setup_cpu):
        monkeypatch.setattr(module, "vllm_version", lambda: "0.99.0")
    assert doctor.run(["model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("starling doctor: error: vLLM 0.99.0 is outside the supported range")


@pytest.mark.parametrize(("command", "code"), [("serve", 2), ("selftest", 1)])
def test_commands_that_need_vllm_are_refused(capsys, command, code):
    assert main.main([command]) == code
    assert "vLLM is not installed" in capsys.readouterr().err


def test_version_and_help(capsys):
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main.main([argument])
        assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "(vLLM not installed)" in printed and "setup-cpu" in printed
