"""The first lines of `starling doctor`, and what it says of the machine."""

from __future__ import annotations

import stat

import pytest

from starling.lab import machine
from starling.lab.doctor.doctor import verdict

GOOD = {"installation": {"problem": None, "vllm": "0.32.0"}}
MODEL = GOOD | {"model": "m", "star_refused": []}


def prompt(tokens: int = 6000, ratio: float = 2.94, attention: str = "star", default: str = "star") -> dict:
    """Of a model of 8,192 tokens."""
    return {
        "tokens": tokens,
        "max_model_len": 8192,
        "attention_work_dense_over_star": ratio,
        "plan_with_star_on": {"attention": attention} | ({} if attention == "star" else {"why": "one star block"}),
        "by_default": default,
        "why": "a reason",
    }


@pytest.mark.parametrize(
    ("report", "first", "code"),
    [
        ({"installation": {"problem": "no vLLM"}}, "Starling does nothing here: no vLLM", 0),
        (GOOD, "vLLM 0.32.0 is supported; ", 0),
        (MODEL, "star: available; --prompt-tokens N", 0),
        (MODEL | {"star_refused": ["a", "b"]}, "star: not with this model and these options: a; b", 0),
        (MODEL | {"star_refused": ["a"], "prompt": prompt()}, "star: not with this model", 0),
        (
            MODEL | {"prompt": prompt(131_072)},
            "131,072 tokens: refused, the model has 8,192 for prompt and output (max_model_len)",
            1,
        ),
        (MODEL | {"star_refused": ["a"], "prompt": prompt(8192)}, "8,192 tokens: refused", 1),
        (
            MODEL | {"prompt": prompt()},
            "star: 2.9 times less attention work at 6,000 tokens; "
            "loss on your model: not measured, run starling advise",
            0,
        ),
        (MODEL | {"prompt": prompt(9, 1.0, "dense")}, "star: no less attention work at 9 tokens: one star block", 0),
    ],
)
def test_the_first_line_and_the_exit_code(report, first, code):
    lines, got = verdict(report)
    assert (lines[0][: len(first)], got) == (first, code)


def test_a_prompt_that_is_dense_by_default_says_why():
    lines, _ = verdict(MODEL | {"prompt": prompt(default="dense")})
    assert lines[1:] == ["by default such a prompt is dense: a reason"]
    assert len(verdict(MODEL | {"prompt": prompt()})[0]) == 1


def smi(folder, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_gpus(tmp_path, monkeypatch):
    """With nvidia-smi's CSV; a GPU that shares the host's memory has no number of it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    rows = "0, NVIDIA H100 80GB HBM3, 81559, 81037, 570.124.06, 9.0\n1, NVIDIA GB10, [N/A], [N/A], 570.124.06, 12.1"
    smi(tmp_path, f"cat <<'END'\n{rows}\nEND")
    found = machine.describe_gpus()
    assert found["gpus"] == [
        "0: NVIDIA H100 80GB HBM3, 79.6 GiB, 79.1 GiB free, compute capability 9.0",
        "1: NVIDIA GB10, [N/A], [N/A] free, compute capability 12.1",
    ]
    assert found["driver"] == "570.124.06"
    assert found["memory"].count("GiB") == 2 and found["cores"] >= 1


def test_a_driver_that_does_not_work_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    smi(tmp_path, "exit 9")
    (line,) = machine.describe_gpus()["gpus"]
    assert line.startswith("nvidia-smi does not work: ") and "9" in line


def test_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe_gpus()["gpus"] == ["no NVIDIA GPU"]
    smi(tmp_path, "exit 0")
    assert machine.describe_gpus()["gpus"] == ["no NVIDIA GPU"]
