"""Model families that vLLM can't serve: registered at plugin load, and served by plain vLLM."""

from __future__ import annotations


def register_models() -> None:
    """Tell Transformers of the configurations, and vLLM of the models, which it imports when it serves one."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from engine_ext.models.attamba_config import AttambaConfig

    AutoConfig.register(AttambaConfig.model_type, AttambaConfig, exist_ok=True)
    ModelRegistry.register_model("AttambaForCausalLM", "engine_ext.models.attamba:AttambaForCausalLM")
