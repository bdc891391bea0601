"""examples/docker: its files refer to what exists, and its queries to metrics that vLLM and Starling export."""

import importlib.util
import json
import re
import shlex
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.metrics import loggers

import engine_ext.metrics
import replicas.metrics
import scheduler.metrics
from engine_ext.serving.cli.main import COMMANDS
from engine_ext.serving.cli.serve_args import admin_options, parse, refuse_open_plaintext
from tests.unit.scheduler.simulation import make_config
from vllm_compat.metrics import DIRECTORY_ENV
from vllm_compat.versions import version_problem

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "examples" / "docker"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
SUFFIXES = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_sum", "_count")}
NOT_METRICS = {"by", "up"}  # `up` is Prometheus' own


def read_yaml(*path: str):
    """A file of examples/docker, with the defaults of compose's variables."""
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", DOCKER.joinpath(*path).read_text())
    return yaml.safe_load(text)


COMPOSE = read_yaml("compose.yaml")
SERVICES = COMPOSE["services"]
SERVERS = ("starling-cpu", "starling-gpu")
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "starling.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in read_yaml("prometheus", "alerts.yml")["groups"] for rule in group["rules"]]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and their arguments."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in a PromQL expression."""
    bare = re.sub(r"\{.*?\}|\[.*?\]|\bby \(.*?\)", " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*(?![\w:]| *\()", bare)) - NOT_METRICS


def labels_of(expression: str) -> set[str]:
    """The labels in a PromQL expression, except a histogram's own."""
    groups = [name for group in re.findall(r"\bby \((.*?)\)", expression) for name in re.split(r", *", group)]
    return {*groups, *re.findall(r"[{,] *(\w+) *[=!]", expression)} - {"le"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The labels of each series that a server exports, by its name."""
    registry, labels = CollectorRegistry(), {}
    config = make_config(tmp_path_factory.mktemp("model"))

    def recorded(kind):
        def make(name, documentation, labelnames=(), **options):
            labels.update({name + suffix: set(labelnames) for suffix in SUFFIXES[kind]})
            return kind(name, documentation, labelnames, registry=registry, **options)

        return staticmethod(make)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(DIRECTORY_ENV, raising=False)
        patch.setattr(loggers, "unregister_vllm_metrics", lambda: None)
        for attribute, kind in (("_counter_cls", Counter), ("_gauge_cls", Gauge), ("_histogram_cls", Histogram)):
            patch.setattr(loggers.PrometheusStatLogger, attribute, recorded(kind))
        for module in (engine_ext.metrics, replicas.metrics, scheduler.metrics):
            for kind in (Counter, Gauge):
                if hasattr(module, kind.__name__):
                    patch.setattr(module, kind.__name__, recorded(kind).__func__)
        loggers.PrometheusStatLogger(config)
        for metrics in (
            engine_ext.metrics.FrontMetrics,
            engine_ext.metrics.WorkerMetrics,
            replicas.metrics.ReplicaMetrics,
            scheduler.metrics.CacheMetrics,
            scheduler.metrics.SchedulerMetrics,
        ):
            metrics()
    return labels


def test_metrics_are_found_in_an_expression():
    expression = 'sum by (le, a) (rate(x:y_bucket{b="c", d!="e"}[5m])) / sum(z) > 0.1'
    assert (metrics_of(expression), labels_of(expression)) == ({"x:y_bucket", "z"}, {"a", "b", "d"})


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_queries_are_for_exported_metrics_and_their_labels(expression, exported):
    names = metrics_of(expression)
    assert names <= exported.keys()
    for name in names:
        assert labels_of(expression) <= exported[name]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_name_labels_that_the_query_keeps(panel, exported):
    for target in panel["targets"]:
        grouped = labels_of(target["expr"])
        kept = grouped or set().union(*(exported[name] for name in metrics_of(target["expr"])))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_panels_have_ids_places_and_the_provisioned_data_source():
    source = read_yaml("grafana", "provisioning", "datasources", "prometheus.yml")["datasources"][0]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    for used in (item["datasource"] for panel in PANELS for item in (panel, *panel["targets"])):
        assert used == {"type": source["type"], "uid": source["uid"]}


def test_all_ports_are_published_on_loopback():
    ports = [port for service in SERVICES.values() for port in service["ports"]]
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
    assert len(runs) >= 3
    for arguments in runs:
        args, grpc_port = parse(arguments)
        refuse_open_plaintext(args, grpc_port, admin_options(args, grpc_port, {"STARLING_ADMIN_KEY": "KEY"}))


def test_services_refer_to_files_and_to_one_another():
    for name in SERVERS:
        build = SERVICES[name]["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    mounts = {
        target: DOCKER / source
        for name in ("prometheus", "grafana")
        for source, target in (volume.split(":")[:2] for volume in SERVICES[name]["volumes"])
        if source.startswith(".")
    }
    assert all(folder.is_dir() for folder in mounts.values())
    prometheus = read_yaml("prometheus", "prometheus.yml")
    assert all((DOCKER / "prometheus" / name).is_file() for name in prometheus["rule_files"])
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    for name in SERVERS:
        assert host in SERVICES[name]["networks"]["default"]["aliases"]
        assert f"--port={port}" in SERVICES[name]["command"]
    assert f'up{{job="{prometheus["scrape_configs"][0]["job_name"]}"}}' in RULES[0]["expr"]
    source = read_yaml("grafana", "provisioning", "datasources", "prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
    provider = read_yaml("grafana", "provisioning", "dashboards", "starling.yml")["providers"][0]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounts[provider["options"]["path"]] / home.name).is_file() and str(home.parent) in mounts


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
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {Path(package).parts[0] for package in config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    needed = packages | {"pyproject.toml", config["project"]["readme"], *config["project"]["license-files"]}
    needed.add("examples/docker/constraints.py")
    assert {f"!/{name}" for name in needed} <= set((ROOT / ".dockerignore").read_text().splitlines())


def test_constraints_keep_all_but_the_wheels_own_requirements(tmp_path):
    specification = importlib.util.spec_from_file_location("constraints", DOCKER / "constraints.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        requires = ("PyYAML>=6", 'torch; extra == "cpu"')
        archive.writestr("x-1.dist-info/METADATA", "\n".join(f"Requires-Dist: {line}" for line in requires))
    names = {line.partition("==")[0] for line in module.constraints(str(wheel))}
    assert {"torch", "pytest"} <= names and "pyyaml" not in names
