"""Hashes of prompts that a front sends since vLLM 0.34: none is taken for a page's key."""

from __future__ import annotations

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, core

from starling.engine_ext.engine_core import StarScheduler
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata
from tests.unit.scheduler.simulation import HASH, PAGE_SIZE, make_config, make_scheduler, random_ids

pytestmark = pytest.mark.skipif(not hasattr(core, "frontend_block_hashes"), reason="fronts hash since vLLM 0.34")

IDS = random_ids(1, 4 * PAGE_SIZE)
HASHES = [bytes([number]) * 32 for number in range(4)]  # of other content
PLAN = StarPlan(PAGE_SIZE, PAGE_SIZE, 0, 3 * PAGE_SIZE, 4 * PAGE_SIZE)


@pytest.fixture
def engine_core(tmp_path, monkeypatch):
    """vLLM's EngineCore as far as it takes requests, made as its __init__ makes it."""
    for name in ("PrefixHashConfig", "frontend_block_hashes"):
        monkeypatch.setattr(core, name, getattr(core, name))  # restored at the end
    config = make_config(tmp_path)
    make_scheduler(config, StarScheduler)
    made = object.__new__(core.EngineCore)
    made.vllm_config, made.mm_receiver_cache = config, None
    made.request_block_hasher = core.get_request_block_hasher(PAGE_SIZE, HASH)
    made.prefix_hash_config = core.PrefixHashConfig("sha256", PAGE_SIZE, b"", 0)
    return made


def request(plan: StarPlan | None, hashes: list[bytes] | None) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="one",
        prompt_token_ids=IDS,
        mm_features=None,
        sampling_params=SamplingParams(extra_args={KEY: RequestMetadata(plan).to_wire()} if plan else None),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        block_hashes=hashes,
    )


def test_the_offer_to_hash_is_withheld(engine_core):
    assert engine_core.prefix_hash_config is None


def test_a_dense_prompt_is_hashed_by_the_engine_core(engine_core):
    sent, _ = engine_core.preprocess_add_request(request(None, HASHES))
    own, _ = engine_core.preprocess_add_request(request(None, None))
    assert sent.block_hashes == own.block_hashes and len(own.block_hashes) == 4


def test_hashes_of_a_prompt_with_a_plan_are_refused(engine_core):
    with pytest.raises(VLLMValidationError, match="block_hashes has 4 hashes") as refused:
        engine_core.preprocess_add_request(request(PLAN, HASHES))
    assert refused.value.parameter == "block_hashes"
    made, _ = engine_core.preprocess_add_request(request(PLAN, None))
    assert len(made.block_hashes) == 4
