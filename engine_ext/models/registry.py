"""Registration of the model families that Starling adds. Plain vLLM serves them as well: they need no activation."""

from __future__ import annotations

from starling.vllm_compat.models import register_models

MODELS = {
    "KVShiftLlamaForCausalLM": "starling.engine_ext.models.kv_shift_llama:KVShiftLlamaForCausalLM",
    "AttambaForCausalLM": "starling.engine_ext.models.attamba:AttambaForCausalLM",
    "BaichuanM1ForCausalLM": "starling.engine_ext.models.baichuan_m1:BaichuanM1ForCausalLM",
}


def register_model_families() -> None:
    """Register the model families with Transformers and vLLM in this process. A second call has no effect."""
    from starling.engine_ext.models.configs import AttambaConfig, BaichuanM1Config, KVShiftLlamaConfig

    configs = (KVShiftLlamaConfig, BaichuanM1Config, AttambaConfig)
    register_models({config.model_type: config for config in configs}, MODELS)
