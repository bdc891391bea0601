"""An engine whose pages other replicas read says that it has released some before a forward may write to them."""

from __future__ import annotations

import pytest

from benchmarks.random_llama import make_random_llama
from starling.scheduler.planning.request_metadata import ONE_HOST
from tests.parity.harness import TINY, run_engine, v2_env
from tests.parity.released_pages import RELEASE_AND_NOTE

pytestmark = pytest.mark.engine

REPLICAS = {
    "kv_connector": "StarConnector",
    "kv_connector_module_path": "starling.features.replicas.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {ONE_HOST: True},
}


@pytest.mark.parametrize("env", [None, v2_env()], ids=["v1", "v2"])
def test_a_released_hold_is_noted_before_the_forward(tmp_path, env):
    model = make_random_llama(tmp_path / "tiny", **TINY)
    run_engine(model, RELEASE_AND_NOTE, env=env, kv_transfer_config=REPLICAS)
