"""An engine in which no layer can run star rows: it starts, and every prompt is dense."""

from __future__ import annotations

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, run_engine


def test_a_server_with_star_auto_starts_dense_where_all_layers_share_a_cache_with_windows(tmp_path):
    """Without the hybrid KV cache manager, which vLLM leaves out for Llama-4, all layers have the windows' cache spec.

    A prompt that says star=off finds all full pages of a prompt that says nothing: pages of star have other keys.
    """
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    model = make_random_llama(tmp_path / "windows", **TINY | layers)
    prompt = {"ids": list(range(250)) + [7] * 50}
    found = run_engine(
        model,
        [[prompt], [prompt | {"extra_args": {"star": "off"}}]],
        star={"star": "auto", "star_min_tokens": 64, "star_block_size": 64},
        disable_hybrid_kv_cache_manager=True,
    )
    (by_default,), (dense,) = found["batches"]
    assert (by_default["cached"], dense["cached"]) == (0, 299 // 32 * 32)
    assert by_default["token_ids"] == dense["token_ids"]
