"""Which models' star blocks are independent of one another, and which engines may reuse them."""

from types import SimpleNamespace

import pytest

from scheduler.block_reuse import reuse_obstacle
from scheduler.independence import dependence


def model(kind: str = "llama", window: int | None = None, hybrid: bool = False, **text) -> SimpleNamespace:
    config = SimpleNamespace(model_type=kind, **text)
    return SimpleNamespace(hf_text_config=config, get_sliding_window=lambda: window, is_hybrid=hybrid)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (model(), None),
        (model(layer_types=["full_attention"] * 2), None),
        (model(window=512), "sliding-window"),
        (model(layer_types=["sliding_attention", "full_attention"]), "sliding-window"),
        (model(layer_types=["linear_attention", "full_attention"]), "linear"),
        (model(hybrid=True), "Mamba"),
        (model("kv_shift_llama"), "kv_shift_llama mixes"),
        (model("baichuan_m1"), "baichuan_m1 mixes"),
        (model("attamba"), "attamba mixes"),
    ],
)
def test_models(config, says):
    reason = dependence(config)
    assert reason is None if says is None else says in reason


def engine(caching: bool = True, connector: object = None, aux: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        kv_transfer_config=connector,
        aux_output_config=SimpleNamespace(enabled=aux),
        model_config=model(),
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (engine(), None),
        (engine(caching=False), "prefix caching is off"),
        (engine(connector=object()), "KV connector"),
        (engine(aux=True), "routed experts"),
    ],
)
def test_engines(config, says):
    reason = reuse_obstacle(config)
    assert reason is None if says is None else says in reason
