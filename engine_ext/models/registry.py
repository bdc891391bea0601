"""The model families that Starling adds to vLLM. Served by plain vLLM as well: they need no activation."""

from __future__ import annotations

from engine_ext import compat

MODELS = {
    "KVShiftLlamaForCausalLM": "engine_ext.models.kv_shift_llama:KVShiftLlamaForCausalLM",
    "AttambaForCausalLM": "engine_ext.models.attamba:AttambaForCausalLM",
    "BaichuanM1ForCausalLM": "engine_ext.models.baichuan_m1:BaichuanM1ForCausalLM",
}


def register_models() -> None:
    """Make them known to Transformers and vLLM, in this process; a second call changes nothing."""
    from engine_ext.models.attamba_config import AttambaConfig
    from engine_ext.models.configs import BaichuanM1Config, KVShiftLlamaConfig

    configs = (KVShiftLlamaConfig, BaichuanM1Config, AttambaConfig)
    compat.register_models({config.model_type: config for config in configs}, MODELS)
