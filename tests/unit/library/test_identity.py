"""Pages are found by engines whose pages are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

from starling.library import identity
from starling.library.identity import described, identity_of


def engine(path: str, **sizes: int) -> Any:
    config = LlamaConfig(**sizes)
    config.name_or_path = path
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=config, quantization=None),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", kv_cache_layout="NHD"),
        attention_config=SimpleNamespace(backend=None),
    )


def test_a_path_of_the_model_makes_no_difference_and_its_sizes_and_weights_do(monkeypatch: Any) -> None:
    monkeypatch.setattr(identity, "cpu_attention_isa", lambda config: None)

    def found(path: str, weights: str = "a", **sizes: int) -> str:
        return identity_of(described(engine(path, **sizes), [weights]))

    assert found("models/tiny") == found("/a/path/to/models/tiny")
    assert len({found("tiny"), found("tiny", hidden_size=64), found("tiny", weights="b")}) == 3
