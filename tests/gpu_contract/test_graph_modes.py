"""CUDA graphs beside Star Attention, as vLLM itself resolves and picks them (docs/documents.md)."""

from __future__ import annotations

import json

import pytest

from benchmarks.random_llama import make_random_llama
from tests.forks import run_in_fork
from tests.parity.harness import TINY, v2_env

MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
DOCUMENTS = {"star": "on", "star_segments": "auto"}
NOT_COMPILED = 0  # vLLM's compilation mode


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="module", params=["V1", "V2"])
def graphs_of(request, model):
    """A function that returns what vLLM does with compilation configurations, by the server's star options."""

    def run(options: dict, graphs: list[dict]) -> list[dict]:
        job = json.dumps({"model": str(model), "runner": request.param, "options": options, "graphs": graphs})
        before = v2_env() | {"VLLM_USE_V2_MODEL_RUNNER": str(int(request.param == "V2")), "VLLM_LOGGING_LEVEL": "ERROR"}
        name = "tests.gpu_contract.graph_modes"
        done = run_in_fork(f"{name}:main", job, imports=(name,), before=before, seconds=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def same(mode: str, decode: str, mixed: str) -> dict[str, str]:
    """What vLLM does; a decode batch that has to run in no full graph has the graph of a mixed one."""
    return {"mode": mode, "decode": decode, "mixed": mixed, "without": mixed, "doctor": mode}


NONE, PIECEWISE = same("NONE", "NONE", "NONE"), same("PIECEWISE", "PIECEWISE", "PIECEWISE")


def test_decode_steps_of_documents_run_in_full_graphs(graphs_of):
    """Full graphs of mixed batches, which vLLM lowers, are not for them."""
    both, decodes = same("FULL_AND_PIECEWISE", "FULL", "PIECEWISE"), same("FULL_DECODE_ONLY", "FULL", "NONE")
    found = graphs_of(DOCUMENTS, [{"cudagraph_mode": mode} for mode in MODES])
    assert found == [NONE, PIECEWISE, both, decodes, both]


def test_without_compilation_documents_have_full_graphs_of_decodes_alone(graphs_of):
    decodes = same("FULL_DECODE_ONLY", "FULL", "NONE")
    found = graphs_of(DOCUMENTS, [{"cudagraph_mode": mode, "mode": NOT_COMPILED} for mode in MODES])
    assert found == [NONE, NONE, decodes, decodes, decodes]


def test_decode_steps_of_other_servers_keep_their_full_graphs(graphs_of):
    """The last one refuses documents, but not its start: star is off by default."""
    both = same("FULL_AND_PIECEWISE", "FULL", "PIECEWISE")
    found = graphs_of({}, [{"cudagraph_mode": mode} for mode in MODES])
    assert found == [NONE, PIECEWISE, both, same("FULL_DECODE_ONLY", "FULL", "NONE"), both]
    assert graphs_of({"star_segments": "auto"}, [{"cudagraph_mode": "FULL"}]) == [both]
