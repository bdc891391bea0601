"""examples/docker: its files refer to what exists, and its commands are accepted."""

import argparse
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from starling.engine_ext.serving.cli.main import COMMANDS
from starling.engine_ext.serving.cli.serve_args import admin_options, parse, refuse_open_plaintext
from starling.vllm_compat.versions import version_problem

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "examples" / "docker"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def read_yaml(*path: str):
    """A file of examples/docker, with the defaults of compose's variables."""
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", DOCKER.joinpath(*path).read_text())
    return yaml.safe_load(text)


COMPOSE = read_yaml("compose.yaml")
SERVICES = COMPOSE["services"]
SERVERS = ("starling-cpu", "starling-gpu")
CONTEXT = (ROOT / ".dockerignore").read_text().splitlines()


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and their arguments."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def test_all_ports_are_published_on_loopback():
    ports = [port for name in SERVERS for port in SERVICES[name]["ports"]]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_command_is_accepted(name):
    args, grpc_port = parse(SERVICES[name]["command"])
    refuse_open_plaintext(args, grpc_port, admin_options(args, grpc_port, {}))
    published = {int(port.rpartition(":")[2]) for port in SERVICES[name]["ports"]}
    assert published == {args.port, grpc_port}
    exposed = dict(instructions(Path(SERVICES[name]["build"]["dockerfile"]).name))["EXPOSE"]
    assert published == set(map(int, exposed.split()))


def test_commands_in_the_docs_are_accepted():
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "docker.md").read_text(), flags=re.DOTALL)
    commands = [command for block in blocks for command in block.replace("\\\n", " ").split("$ ")]
    runs = [shlex.split(re.split(r" starling:(?:cpu|cuda) ", c)[1]) for c in commands if c.startswith("docker run")]
    assert len(runs) == 2
    for arguments in runs:
        args, grpc_port = parse(arguments)
        refuse_open_plaintext(args, grpc_port, admin_options(args, grpc_port, {"STARLING_ADMIN_KEY": "KEY"}))


def test_services_refer_to_files_and_to_one_another():
    for name in SERVERS:
        build = SERVICES[name]["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    ((target,),) = [group["targets"] for group in read_yaml("targets.yml")]
    host, _, port = target.partition(":")
    for name in SERVERS:
        assert host in SERVICES[name]["networks"]["default"]["aliases"]
        assert f"--port={port}" in SERVICES[name]["command"]
    monitoring = yaml.safe_load((DOCKER / "../monitoring/compose.yaml").read_text())["services"]
    for name, service in monitoring.items():
        assert SERVICES[name]["extends"] == {"file": "../monitoring/compose.yaml", "service": name}
        named = {volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith(".")}
        assert named <= COMPOSE["volumes"].keys()
    (mount,) = SERVICES["prometheus"]["volumes"]
    source, target, _ = mount.split(":")
    assert (DOCKER / source).is_file()
    configuration = monitoring["prometheus"]["volumes"][0].split(":")
    assert (DOCKER / "../monitoring" / configuration[0] / Path(target).relative_to(configuration[1])).is_file()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_the_server_as_another_user_than_root(name):
    found = instructions(name)
    last = dict(found)
    assert json.loads(last["ENTRYPOINT"]) == ["starling", "serve"]
    assert last["USER"] == "10001:0"
    assert "STARLING_HEALTH_URL" in last["HEALTHCHECK"]
    used = {name for kind, text in found if kind == "RUN" for name in re.findall(r"\bstarling ([a-z][a-z-]*)", text)}
    assert used <= COMMANDS.keys()


def test_starling_supports_the_vllm_of_the_cuda_image():
    arguments = [text for kind, text in instructions("Dockerfile.cuda") if kind == "ARG"]
    (version,) = (text.partition("=")[2] for text in arguments if text.startswith("VLLM_VERSION="))
    assert version_problem(version) is None


def test_the_build_context_has_what_the_wheel_is_built_from():
    """The wheel's folder has links to the others, which hatch follows."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [ROOT / package for package in config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    linked = [link.resolve() for package in packages for link in package.iterdir() if link.is_symlink()]
    folders = {path.relative_to(ROOT).parts[0] for path in [*packages, *linked]}
    assert len(folders) > 5
    readme = [part["path"] for part in config["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["fragments"]]
    needed = folders | {"pyproject.toml", *readme, *config["project"]["license-files"]}
    assert {f"!/{name}" for name in needed} <= set(CONTEXT)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_build_context_has_the_files_that_the_builds_name(name):
    text = (DOCKER / name).read_text()
    named = {f".ci/{path}" for path in re.findall(r"(?:/ci|\.ci)/([\w.-]+)", text)}
    named |= set(re.findall(r"source=(examples/\S+?),", text))
    assert len(named) >= 2
    assert all((ROOT / path).is_file() for path in named)
    assert {f"!/{path}" for path in named} <= set(CONTEXT)


def check_requirements(*names: str) -> subprocess.CompletedProcess[str]:
    program = DOCKER / "check_requirements.py"
    return subprocess.run([sys.executable, str(program), *names], capture_output=True, text=True)


def test_requirements_that_are_not_met_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "x-1.dist-info"
    folder.mkdir()
    requires = ("PyYAML>=999", "rich>=1", "no-such-package", 'torch>=999; extra == "cpu"', "a; python_version < '3'")
    lines = ["Metadata-Version: 2.1", "Name: x", "Version: 1", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = check_requirements("x")
    assert found.returncode == 1
    assert found.stderr == (
        f"PyYAML>=999 is required, and {yaml.__version__} is installed\nno-such-package is not installed\n"
    )


def test_a_gateway_calls_the_servers_that_it_has_for_itself():
    router_args = pytest.importorskip("smg.router_args", reason="there is no wheel of smg here").RouterArgs
    services = read_yaml("compose.gateway.yaml")["services"]
    gateway = services.pop("gateway")
    assert gateway["depends_on"].keys() == services.keys()
    assert all(port.startswith("127.0.0.1:") for port in gateway["ports"])
    for server in services.values():
        args, grpc_port = parse(server["command"])
        refuse_open_plaintext(args, grpc_port, admin_options(args, grpc_port, {}))
        assert server["networks"] == ["workers"], "where no port is published"
        assert "ports" not in server
    parser = argparse.ArgumentParser()
    router_args.add_cli_args(parser)
    _, _, *options = gateway["command"]
    asked = parser.parse_args(options)
    assert asked.worker_urls == [f"grpc://{name}:{grpc_port}" for name in services]
    assert f"127.0.0.1:{asked.port}:{asked.port}" in gateway["ports"]
    installed = importlib.metadata.version("smg")
    assert f"smg=={installed}" in gateway["build"]["dockerfile_inline"], "the version of tests/e2e/test_gateways.py"
