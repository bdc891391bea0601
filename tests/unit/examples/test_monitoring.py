"""examples/monitoring: its files refer to what exists, and its queries to metrics that vLLM and Starling export."""

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.metrics import loggers

import starling.engine_ext.front.observability
import starling.engine_ext.worker.star_worker
import starling.features.library.tier
import starling.features.replicas.page_transfer
import starling.features.replicas.split.split_state
import starling.scheduler.provenance
from starling.vllm_compat.metrics import DIRECTORY_ENV
from tests.dashboard import (
    DASHBOARD,
    EXPRESSIONS,
    MONITORING,
    PANELS,
    QUERIES,
    RULES,
    labels_of,
    metrics_of,
)
from tests.unit.scheduler.simulation import make_config

SUFFIXES = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_sum", "_count")}


def read_yaml(*path: str):
    return yaml.safe_load(MONITORING.joinpath(*path).read_text())


SERVICES = read_yaml("compose.yaml")["services"]


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
        stats = loggers.PrometheusStatLogger
        parts = (stats._spec_decoding_cls, stats._kv_connector_cls, stats._ec_connector_cls, stats._perf_metrics_cls)
        for owner in (stats, *parts):
            for attribute, kind in (("_counter_cls", Counter), ("_gauge_cls", Gauge), ("_histogram_cls", Histogram)):
                if hasattr(owner, attribute):
                    patch.setattr(owner, attribute, recorded(kind))
        modules = (
            starling.engine_ext.front.observability,
            starling.engine_ext.worker.star_worker,
            starling.features.library.tier,
            starling.features.replicas.split.split_state,
            starling.features.replicas.page_transfer,
            starling.scheduler.provenance,
        )
        for module in modules:
            for kind in (Counter, Gauge):
                if hasattr(module, kind.__name__):
                    patch.setattr(module, kind.__name__, recorded(kind).__func__)
        loggers.PrometheusStatLogger(config)
        for metrics in (
            starling.engine_ext.front.observability.FrontMetrics,
            starling.engine_ext.worker.star_worker.WorkerMetrics,
            starling.features.library.tier.LibraryMetrics,
            starling.features.replicas.split.split_state.SplitMetrics,
            starling.features.replicas.page_transfer.ReplicaMetrics,
            starling.scheduler.provenance.CacheMetrics,
            starling.scheduler.provenance.SchedulerMetrics,
        ):
            metrics()
    return labels


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_queries_are_for_exported_metrics_and_their_labels(expression, exported):
    names = metrics_of(expression)
    assert names <= exported.keys()
    for name in names:
        assert labels_of(expression) <= exported[name]


def test_every_series_of_starling_is_on_the_dashboard(exported):
    """`tests/e2e/test_replicas.py` has the same test of a server's /metrics."""
    shown = set().union(*map(metrics_of, QUERIES))
    assert {name for name in exported if name.startswith("starling:")} - shown == set()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_name_labels_that_the_query_keeps(panel, exported):
    for target in panel["targets"]:
        grouped = labels_of(target["expr"])
        kept = grouped or set().union(*(exported[name] for name in metrics_of(target["expr"])))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_panels_have_ids_and_the_provisioned_data_source():
    source = read_yaml("grafana", "provisioning", "datasources", "prometheus.yml")["datasources"][0]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for used in (item["datasource"] for panel in PANELS for item in (panel, *panel["targets"])):
        assert used == {"type": source["type"], "uid": source["uid"]}


def test_services_refer_to_files_and_to_one_another():
    mounts = {
        target: MONITORING / source
        for service in SERVICES.values()
        for source, target in (volume.split(":")[:2] for volume in service["volumes"])
        if source.startswith(".")
    }
    assert all(folder.is_dir() for folder in mounts.values())
    prometheus = read_yaml("prometheus", "prometheus.yml")
    (job,) = prometheus["scrape_configs"]
    (targets,) = job["file_sd_configs"]
    assert all((MONITORING / "prometheus" / name).is_file() for name in prometheus["rule_files"] + targets["files"])
    assert f'up{{job="{job["job_name"]}"}}' in RULES[0]["expr"]
    ((address,),) = [group["targets"] for group in read_yaml("prometheus", "targets.yml")]
    assert SERVICES["prometheus"]["extra_hosts"] == [f"{address.partition(':')[0]}:host-gateway"]
    source = read_yaml("grafana", "provisioning", "datasources", "prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
    provider = read_yaml("grafana", "provisioning", "dashboards", "starling.yml")["providers"][0]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounts[provider["options"]["path"]] / home.name).is_file() and str(home.parent) in mounts


def test_images_have_versions_and_ports_are_published_on_loopback():
    for service in SERVICES.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["ports"] and all(port.startswith("127.0.0.1:") for port in service["ports"])
