"""Which models have independent star blocks, and which engines may reuse them behind a hole."""

from types import SimpleNamespace

import pytest

from starling.engine_ext.models.configs import AttambaConfig, BaichuanM1Config, KVShiftLlamaConfig
from starling.features.reuse.core import reuse_refusal
from starling.scheduler.planning.facts import dependence
from starling.scheduler.planning.request_metadata import CONNECTOR


def model(window: int | None = None, hybrid: bool = False, **text) -> SimpleNamespace:
    config = SimpleNamespace(**text)
    return SimpleNamespace(hf_text_config=config, get_sliding_window=lambda: window, is_hybrid=hybrid)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (model(), None),
        (model(layer_types=["full_attention"] * 2), None),
        (model(window=512), "sliding window"),
        (model(layer_types=["sliding_attention", "full_attention"]), "sliding_attention"),
        (model(layer_types=["linear_attention", "full_attention"]), "linear_attention"),
        (model(hybrid=True), "hybrid"),
        (model(star_blocks_depend="because"), "because"),
    ],
)
def test_dependence_names_the_layers_that_make_blocks_dependent(config, word):
    reason = dependence(config)
    assert reason is None if word is None else word in reason


@pytest.mark.parametrize("config", [KVShiftLlamaConfig, BaichuanM1Config, AttambaConfig])
def test_starlings_own_models_have_a_reason_for_dependent_blocks(config):
    assert "into" in config.star_blocks_depend


def engine(caching: bool = True, connector: object = None, aux: bool = False, drafts: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=drafts,
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        kv_transfer_config=connector,
        aux_output_config=SimpleNamespace(enabled=aux),
        model_config=model(),
    )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (engine(), None),
        (engine(caching=False), "prefix caching is off"),
        (engine(connector=SimpleNamespace(kv_connector="OffloadingConnector")), "KV connector"),
        (engine(connector=SimpleNamespace(kv_connector=CONNECTOR)), None),
        (engine(aux=True), "routed experts"),
        (engine(drafts=object()), "speculative decoding"),
    ],
)
def test_reuse_refusal_names_the_setting_that_prevents_reuse(config, word):
    reason = reuse_refusal(config)
    assert reason is None if word is None else word in reason
