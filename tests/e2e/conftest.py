"""One `starling serve` process for each test file that uses it, with clients of HTTP and gRPC."""

import json

import grpc
import httpx
import pytest

import examples.server
from benchmarks.random_llama import make_tiny_llama
from examples.server import end_on_signals, serving
from starling.v1 import inference_pb2_grpc
from tests.e2e.serving import MODEL, NO_REUSE, PAGE_SIZE
from tests.forks import forking, start_program
from tests.signals import kept_signals


@pytest.fixture(autouse=True, scope="package")
def signals_end_servers():
    """A signal to the test run also stops the servers of its tests."""
    with kept_signals():
        end_on_signals()
        yield


@pytest.fixture(scope="module")
def forked():
    """The servers of a file with this fixture, their engines and workers are forks, which saves imports of vLLM.

    Of one engine's server two or three, and seven of two replicas'. The files without it start and spawn them, as vLLM
    does on CPU: servers of one engine, of plain vLLM, over two hosts, and those whose tests look at the start or at
    faults.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in forking().items():
            patch.setenv(name, value)
        patch.setattr(examples.server, "Popen", start_program)
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    # Slow enough that a long output still runs when a test on a busy machine looks at it.
    model = make_tiny_llama(folder / MODEL, num_hidden_layers=6)
    options = ["--served-model-name", MODEL, "--dtype", "float32", "--block-size", str(PAGE_SIZE), "--enforce-eager"]
    scores = folder / "scores.json"
    scores.write_text(json.dumps({"scores": [[layer, -layer] for layer in range(6)]}))
    options += ["--star-heads", str(scores)]
    # In the test of SIGTERM, running streams end within this grace period on a slow machine too.
    options += ["--max-num-batched-tokens", "512", "--shutdown-timeout", "600", "--enable-prompt-tokens-details"]
    with serving(model, *options, log=folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def generate(channel):
    return inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.http, timeout=300, limits=NO_REUSE) as client:
        yield client


@pytest.fixture(scope="module")
def stub(channel):
    return inference_pb2_grpc.InferenceServiceStub(channel)
