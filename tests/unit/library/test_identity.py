"""Pages are found by engines whose pages are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig
from vllm.config import CacheConfig
from vllm.v1.attention.backends.utils import record_kv_cache_layout

from starling.features.library.identity import described, identity_of, layouts_of

LAYER = "layers.0"


def engine(path: str = "tiny", max_model_len: int = 4096, **sizes: Any) -> Any:
    config = LlamaConfig(**sizes)
    config.name_or_path = path
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=config, quantization=None, dtype=torch.bfloat16, max_model_len=max_model_len
        ),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
    )


def on_gpu(dtype: str = "auto", backend: str = "FLASH_ATTN", order: str = "LBNHC", **layer: Any) -> dict[str, str]:
    """The layouts of a worker with one layer, whose cache has a dtype of its own."""
    cache = CacheConfig()
    record_kv_cache_layout(cache, order)
    one = SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), kv_cache_dtype=dtype, **layer
    )
    config = engine()
    config.cache_config = cache
    config.compilation_config = SimpleNamespace(static_forward_context={LAYER: one})
    return layouts_of(config, [LAYER])


def found(config: Any, weights: str = "a", layouts: dict[str, str] | None = None) -> str:
    return identity_of(described(config, [weights], [on_gpu() if layouts is None else layouts]))


def test_a_path_of_the_model_makes_no_difference_and_its_sizes_and_weights_do() -> None:
    assert found(engine("models/tiny")) == found(engine("/a/path/to/models/tiny"))
    assert len({found(engine()), found(engine(hidden_size=64)), found(engine(), weights="b")}) == 3


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_the_host_of_a_gpu_makes_no_difference(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """vLLM's CPU backend would choose another layout on each of these hosts, and has none for fp8 on the last one."""
    identities = set()
    for avx512, amx in ((True, True), (True, False), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda has=avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        identities.add(found(engine(), layouts=on_gpu(dtype)))
    assert len(identities) == 1


def test_what_pages_are_laid_out_for_makes_a_difference() -> None:
    others = [{}, {"dtype": "fp8"}, {"backend": "FLASHINFER"}, {"order": "LBHNC"}, {"isa": "vec"}, {"isa": "amx"}]
    assert len({found(engine(), layouts=on_gpu(**other)) for other in others}) == len(others)
    assert on_gpu("auto") == on_gpu("bfloat16") == {LAYER: "FLASH_ATTN/any/bfloat16/LBNHC"}


def test_the_version_of_transformers_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    here = found(engine())
    to_dict = PretrainedConfig.to_dict
    monkeypatch.setattr(
        PretrainedConfig, "to_dict", lambda config: to_dict(config) | {"transformers_version": "another"}
    )
    assert found(engine()) == here


def test_a_length_makes_a_difference_where_keys_are_turned_for_it() -> None:
    rope = {
        "rope_theta": 1e4,
        "rope_type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 4096,
    }

    def lengths(**more: Any) -> list[str]:
        return [found(engine(max_model_len=length, **more)) for length in (2048, 4096, 4097, 8192)]

    assert len(set(lengths())) == 1
    short, also_short, long, also_long = lengths(rope_parameters=rope)
    assert short == also_short != long == also_long
