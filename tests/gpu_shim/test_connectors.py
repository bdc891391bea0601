"""An engine with a library and replicas, on a GPU that is not there: its connectors' calls, its files and its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_llama import make_random_llama
from tests.gpu_shim.harness import run_gpu_engine
from tests.parity.harness import TINY
from tests.parity.released_pages import RELEASE_AND_NOTE
from tests.parity.test_documents import tokens_of
from tests.parity.test_library import AFTER, FORGET
from tests.parity.test_released_pages import REPLICAS

pytestmark = pytest.mark.engine


def library_and_replicas(folder: Path) -> dict[str, Any]:
    """Return the connector of an engine with a library and replicas, as start/library_connector.py makes it."""
    tier = {"type": "LibraryTier", "module_path": "starling.features.library.tier", "root_dir": str(folder)}
    library = {
        "kv_connector": "LibraryConnector",
        "kv_connector_module_path": "starling.features.library.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "LibrarySpec",
            "spec_module_path": "starling.features.library.spec",
            "cpu_bytes_to_use": 1 << 24,
            "secondary_tiers": [tier | {"file_bytes": 1 << 24}],
        },
    }
    both = {
        "kv_connector": "LibraryAndReplicasConnector",
        "kv_connector_module_path": "starling.features.library.beside_replicas",
    }
    return REPLICAS | both | {"kv_connector_extra_config": {"connectors": [REPLICAS, library]}}


def test_a_library_of_fp8_pages_and_replicas_on_a_host_without_avx512(tmp_path):
    """The library's pages are found in host memory: its files are closed once a job calls a function of its worker.

    The engine ends without a traceback (connectors_job.py).
    """
    model = make_random_llama(tmp_path / "tiny", **TINY)
    prompt = {"ids": tokens_of(5, 150), "max_tokens": 4}
    result = run_gpu_engine(
        model,
        [*RELEASE_AND_NOTE, [prompt], [AFTER], FORGET, [prompt]],
        job="connectors_job",
        kv_cache_dtype="fp8",
        kv_transfer_config=library_and_replicas(tmp_path / "pages"),
    )
    _, (cold,), _, (warm,) = result["batches"]
    assert (cold["cached"], warm["cached"]) == (0, 128)
    assert warm["token_ids"] == cold["token_ids"] and warm["logprobs"] == pytest.approx(cold["logprobs"], abs=1e-4)
    settings = [json.loads(path.read_text()) for path in (tmp_path / "pages").glob("*/config.json")]
    (workers,) = [found["layouts"] for found in settings if "layouts" in found]  # vLLM describes its folder too
    layouts = {layout for worker in workers for layout in worker.values()}
    assert {layout.rpartition("/")[0] for layout in layouts} == {"FLASH_ATTN/any/fp8"}, "and the order of dimensions"
