"""examples/kubernetes: Kubernetes' schemas accept the manifests, and their parts refer to what exists."""

import importlib
import json
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from starling.config.entry import parse_config
from starling.engine_ext.serving.cli.serve_args import admin_options, parse, refuse_open_plaintext

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "kubernetes"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
# The oldest Kubernetes whose fields the manifests may use (docs/kubernetes.md), and the newest with known schemas.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
ENGINE_STOP_SECONDS = 15  # docs/docker.md

LWS_NAMES = {"LWS_LEADER_ADDRESS": "10.0.0.1", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
LWS_TEMPLATES = ("leaderTemplate", "workerTemplate")


def read(name: str) -> list[dict]:
    """The documents of a file of examples/kubernetes."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def patched(value, patch):
    """A value with a strategic merge patch of Kubernetes: null removes, and lists of named objects merge by name."""
    if isinstance(patch, dict):
        value = value if isinstance(value, dict) else {}
        merged = {**value, **{key: patched(value.get(key), item) for key, item in patch.items()}}
        return {key: item for key, item in merged.items() if item is not None}
    if isinstance(patch, list) and all(isinstance(item, dict) for item in patch):
        named = {item["name"]: item for item in value or []}
        named |= {item["name"]: patched(named.get(item["name"]), item) for item in patch}
        return list(named.values())
    return patch


(DEPLOYMENT,) = read("deployment.yaml")
(CPU_PATCH,) = read("cpu.yaml")
CPU = patched(DEPLOYMENT, CPU_PATCH)
*SET_OBJECTS, SET = read("leaderworkerset.yaml")
NETWORK, MODELS = read("network.yaml"), read("models.yaml")
POOL, ROUTE, PICKER, PICKER_SERVICE, PICKER_POLICY = read("inference-pool.yaml")
LEADER, WORKER = (SET["spec"]["leaderWorkerTemplate"][name] for name in LWS_TEMPLATES)
SERVERS = {"gpu": DEPLOYMENT["spec"]["template"], "cpu": CPU["spec"]["template"], "leader": LEADER, "worker": WORKER}
FRONTS = ("gpu", "cpu", "leader")
SERVICES = {item["metadata"]["name"]: item for item in NETWORK + SET_OBJECTS if item["kind"] == "Service"}
POLICIES = [item["spec"] for item in NETWORK + SET_OBJECTS if item["kind"] == "NetworkPolicy"]
BUILT_IN = [DEPLOYMENT, CPU, *NETWORK, *MODELS, *SET_OBJECTS, PICKER, PICKER_SERVICE, PICKER_POLICY] + [
    {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
    for name, template in zip(LWS_TEMPLATES, (LEADER, WORKER), strict=True)
]


def container(name: str) -> dict:
    (found,) = SERVERS[name]["spec"]["containers"]
    return found


def labels(name: str) -> dict:
    return SERVERS[name]["metadata"]["labels"]


def ports(name: str) -> dict[str, int]:
    """The ports of a server's container by their names."""
    return {port["name"]: port["containerPort"] for port in container(name).get("ports", [])}


def selects(selector: dict, labels: dict) -> bool:
    return selector.items() <= labels.items()


def selected(selector: dict) -> set[str]:
    """The servers that a selector of labels selects."""
    assert selector, "an empty selector selects every pod"
    return {name for name in SERVERS if selects(selector, labels(name))}


def secret_keys(name: str) -> dict[str, str]:
    """The environment variables of a server that come from the Secret, and their keys there."""
    sources = {item["name"]: item.get("valueFrom", {}).get("secretKeyRef") for item in container(name)["env"]}
    assert all(source["name"] == "starling" for source in sources.values() if source)
    return {name: source["key"] for name, source in sources.items() if source}


def environment(name: str) -> dict[str, str]:
    """The environment of a server's container, with examples of what Kubernetes and LeaderWorkerSet set."""
    values = {item["name"]: item.get("value", "10.0.0.1") for item in container(name)["env"]}
    return values | (LWS_NAMES if name in ("leader", "worker") else {})


def arguments(name: str) -> list[str]:
    """A server's arguments, with its environment inserted as Kubernetes does it."""
    values = environment(name)
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text) for text in container(name)["args"]]


@pytest.fixture
def parsed(monkeypatch):
    """A function that parses a server's command line in its environment."""

    def parse_server(name):
        for variable, value in environment(name).items():
            monkeypatch.setenv(variable, value)
        args, grpc_port = parse(arguments(name))
        refuse_open_plaintext(args, grpc_port, admin_options(args, grpc_port, {}))
        return args, grpc_port

    return parse_server


def open_ports(name: str, direction: str, other: dict) -> set[tuple[str, int | None]]:
    """Protocols and ports that NetworkPolicies open between a server and a pod with other labels; None: every port."""
    policies = [policy for policy in POLICIES if selects(policy["podSelector"]["matchLabels"], labels(name))]
    policies = [policy for policy in policies if direction in policy["policyTypes"]]
    assert policies, "without a policy, everything is open"
    found = set()
    for rule in (rule for policy in policies for rule in policy[direction.lower()]):
        sides = rule.get("from" if direction == "Ingress" else "to")
        assert sides is None or all(side.keys() == {"podSelector"} for side in sides)
        if sides is None or any(selects(side["podSelector"]["matchLabels"], other) for side in sides):
            found |= {(port["protocol"], port.get("port")) for port in rule["ports"]}
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", BUILT_IN, ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_schemas_accept_the_manifests(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_leader_worker_set_has_no_service_of_its_own_name():
    """LeaderWorkerSet makes one. There is no schema for it."""
    assert (SET["apiVersion"], SET["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    assert SET.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert SET["metadata"]["name"] not in SERVICES


@pytest.mark.parametrize("name", FRONTS)
def test_command_lines_of_fronts_are_accepted(name, parsed):
    args, grpc_port = parsed(name)
    assert ports(name) == {"http": args.port, "grpc": grpc_port}
    probes = container(name)
    assert probes["readinessProbe"]["grpc"] == {"port": grpc_port}
    for probe in ("startupProbe", "livenessProbe"):
        assert probes[probe]["httpGet"] == {"path": "/health", "port": "http"}
    scrape = SERVERS[name]["metadata"]["annotations"]
    assert scrape["prometheus.io/port"] == str(args.port)


def test_the_workers_command_line_is_accepted_and_goes_with_the_leaders(parsed):
    leader, _ = parsed("leader")
    worker, _ = parsed("worker")
    assert worker.headless and not leader.headless and ports("worker") == {}
    assert (leader.data_parallel_start_rank, worker.data_parallel_start_rank) == (None, 1)
    for option in ("model_tag", "served_model_name", "additional_config", "shutdown_timeout", "data_parallel_address"):
        assert getattr(leader, option) == getattr(worker, option)
    for args in (leader, worker):
        assert args.data_parallel_size == int(LWS_NAMES["LWS_GROUP_SIZE"]) and args.data_parallel_size_local == 1


@pytest.mark.parametrize("name", SERVERS)
def test_servers_have_time_to_start_and_to_end(name, parsed):
    args, _ = parsed(name)
    spec = SERVERS[name]["spec"]
    pre_stop = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert spec["terminationGracePeriodSeconds"] >= pre_stop + args.shutdown_timeout + ENGINE_STOP_SECONDS
    assert spec["shareProcessNamespace"]
    if probe := container(name).get("startupProbe"):
        assert probe["periodSeconds"] * probe["failureThreshold"] < DEPLOYMENT["spec"]["progressDeadlineSeconds"]


def test_services_select_fronts_and_name_their_ports():
    chosen = {name: selected(service["spec"]["selector"]) for name, service in SERVICES.items()}
    front, host = {"gpu", "cpu"}, {"leader"}
    assert chosen == {"starling": front, "starling-pods": front, "starling-hosts-front": host}
    for service, servers in chosen.items():
        for port in SERVICES[service]["spec"]["ports"]:
            assert {ports(name)[port["targetPort"]] for name in servers} == {port["port"]}
    (budget,) = (item["spec"] for item in NETWORK if item["kind"] == "PodDisruptionBudget")
    for selector in (budget["selector"], DEPLOYMENT["spec"]["selector"]):
        assert selected(selector["matchLabels"]) == front


@pytest.mark.parametrize("name", SERVERS)
def test_only_the_fronts_ports_are_open_to_others(name):
    every_port, dns = {("TCP", None)}, {("UDP", 53), ("TCP", 53)}
    for_clients = {("TCP", port) for port in ports(name).values()}
    for other in ({}, *map(labels, SERVERS)):
        same_name = other.get("app.kubernetes.io/name") == labels(name)["app.kubernetes.io/name"]
        own = same_name and name not in ("gpu", "cpu")  # replicas of one server exchange KV pages, and servers none
        assert open_ports(name, "Ingress", other) == for_clients | (every_port if own else set())
        assert open_ports(name, "Egress", other) == dns | (every_port if own else set())


def test_the_docs_create_the_secret_with_all_keys():
    (command,) = re.findall(r"^\$ (printf .*?)$", PAGE.replace("\\\n", " "), flags=re.MULTILINE)
    assert "kubectl create secret generic starling --from-env-file=/dev/stdin" in " ".join(command.split())
    created = set(re.findall(r"([\w-]+)=%s", command.replace(r"\n", " ")))
    assert created == {key for name in SERVERS for key in secret_keys(name).values()}
    assert secret_keys("gpu") == {"VLLM_API_KEY": "api-key"}
    assert secret_keys("leader") == {"VLLM_API_KEY": "api-key"}


@pytest.mark.parametrize("name", SERVERS)
def test_servers_mount_all_volumes_and_can_write_where_they_must(name):
    volumes = {volume["name"]: volume for volume in SERVERS[name]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(name)["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    (claim,) = (item["metadata"]["name"] for item in MODELS if item["kind"] == "PersistentVolumeClaim")
    models = mounts.pop("/models")
    assert models["readOnly"] and volumes[models["name"]]["persistentVolumeClaim"]["claimName"] == claim
    assert arguments(name)[0].startswith("/models/")
    assert mounts.keys() == {"/home/starling/.cache", "/tmp", "/dev/shm"}
    media = {path: volumes[mount["name"]]["emptyDir"].get("medium") for path, mount in mounts.items()}
    assert [path for path, medium in media.items() if medium == "Memory"] == ["/dev/shm"]


@pytest.mark.parametrize(
    "pod", [*SERVERS.values(), MODELS[1], PICKER["spec"]["template"]], ids=[*SERVERS, "models", "picker"]
)
def test_pods_meet_the_restricted_security_standard(pod):
    spec, context = pod["spec"], pod["spec"]["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all(volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in spec.get("volumes", []))
    assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
    for item in spec["containers"]:
        assert item["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", SERVERS)
def test_images_are_those_of_the_docker_page_and_run_as_their_users(name):
    image = container(name)["image"]
    (dockerfile,) = re.findall(rf"docker build -f (\S+) -t {image} ", (ROOT / "docs" / "docker.md").read_text())
    text = (ROOT / dockerfile).read_text()
    context = SERVERS[name]["spec"]["securityContext"]
    assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in text
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, flags=re.MULTILINE)[-1]) == ["starling", "serve"]
    assert "command" not in container(name)


def test_the_docs_name_every_manifest():
    named = set(re.findall(r"examples/kubernetes/([\w-]+\.yaml)", PAGE))
    assert named == {path.name for path in FOLDER.iterdir()}


def test_the_pool_has_the_deployments_pods_and_the_route_leads_to_it():
    """Both were valid by the real schemas (docs/routers.md), which no package has. These are the fields they had."""
    assert (POOL["apiVersion"], POOL["kind"]) == ("inference.networking.k8s.io/v1", "InferencePool")
    assert POOL["spec"].keys() == {"selector", "targetPorts", "endpointPickerRef"}
    assert selected(POOL["spec"]["selector"]["matchLabels"]) == {"gpu", "cpu"}
    assert POOL["spec"]["targetPorts"] == [{"number": ports("gpu")["http"]}]
    (port,) = PICKER_SERVICE["spec"]["ports"]
    reference = {"name": PICKER_SERVICE["metadata"]["name"], "port": {"number": port["port"]}}
    assert POOL["spec"]["endpointPickerRef"] == reference | {"failureMode": "FailOpen"}
    assert (ROUTE["apiVersion"], ROUTE["kind"]) == ("gateway.networking.k8s.io/v1", "HTTPRoute")
    assert ROUTE["spec"].keys() == {"parentRefs", "rules"}
    (rule,) = ROUTE["spec"]["rules"]
    assert rule.keys() == {"matches", "backendRefs", "timeouts"}
    group = POOL["apiVersion"].partition("/")[0]
    assert rule["backendRefs"] == [{"group": group, "kind": POOL["kind"], "name": POOL["metadata"]["name"]}]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1/"}}], "no other path is for clients"


def test_the_picker_finds_the_pools_pods_and_gateways_find_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    picker = importlib.import_module("endpoint_picker")
    template = PICKER["spec"]["template"]
    (container,) = template["spec"]["containers"]
    args = picker.parse(container["args"])
    ((host, _, port),) = (name.rpartition(":") for name in args.names)
    assert SERVICES[host]["spec"]["clusterIP"] == "None"
    assert selected(SERVICES[host]["spec"]["selector"]) == {"gpu", "cpu"}
    assert int(port) == ports("gpu")["http"]
    assert template["spec"]["terminationGracePeriodSeconds"] > picker.GRACE_SECONDS
    open_to_gateways = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert open_to_gateways == {"ext-proc": args.port, "health": args.health_port}
    for probe in ("readinessProbe", "livenessProbe"):
        check = container[probe]["grpc"]
        assert check["port"] == args.health_port and check["service"] in picker.HEALTH_NAMES
    (entry,) = PICKER_SERVICE["spec"]["ports"]
    assert open_to_gateways[entry["targetPort"]] == entry["port"]
    own = template["metadata"]["labels"]
    selectors = [PICKER["spec"]["selector"]["matchLabels"], PICKER_SERVICE["spec"]["selector"]]
    for selector in [*selectors, PICKER_POLICY["spec"]["podSelector"]["matchLabels"]]:
        assert selects(selector, own) and not selected(selector)
    assert not selects(POOL["spec"]["selector"]["matchLabels"], own), "the picker is no server"
    servers, dns = PICKER_POLICY["spec"]["egress"]
    (side,) = servers["to"]
    assert selected(side["podSelector"]["matchLabels"]) == {"gpu", "cpu"}
    assert servers["ports"] == [{"protocol": "TCP", "port": int(port)}]
    assert {each["port"] for each in dns["ports"]} == {53}
    assert ("TCP", int(port)) in open_ports("gpu", "Ingress", own)


def test_the_pickers_image_has_what_the_program_imports():
    text = (ROOT / "examples/docker/Dockerfile.picker").read_text()
    (container,) = PICKER["spec"]["template"]["spec"]["containers"]
    assert f"docker build -f examples/docker/Dockerfile.picker -t {container['image']} ." in text
    context = PICKER["spec"]["template"]["spec"]["securityContext"]
    assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in text
    assert "--require-hashes --only-binary :all: -r /ci/requirements-image-picker.lock" in text
    locked = (ROOT / ".ci/requirements-image-picker.lock").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([^\s;]+)", locked, flags=re.MULTILINE))
    assert {"envoy-data-plane", "grpcio-health-checking", "httpx", "starlette", "uvicorn"} <= pins.keys()
    copied = re.findall(r"^COPY (.*) /opt/picker/$", text, flags=re.MULTILINE)[0].split()
    assert {f"!/{path}" for path in copied} <= set((ROOT / ".dockerignore").read_text().splitlines())


def test_vllms_production_stack_gets_options_that_exist():
    """The chart starts `vllm serve` with these arguments; it was rendered by hand (docs/kubernetes.md)."""
    (values,) = read("production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    option, text = model["vllmConfig"]["extraArgs"]
    assert option == "--additional-config"
    config = parse_config(json.loads(text))
    assert config is not None
    assert config.star.mode == "auto"
    image = (ROOT / "examples/docker/Dockerfile.cuda").read_text()
    assert "HF_HUB_OFFLINE=1" in image, "the image looks for no model on a hub"
    assert model["env"] == [{"name": "HF_HUB_OFFLINE", "value": "0"}], "the model is one of a hub"
