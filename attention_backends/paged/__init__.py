"""Starling's paged attention as attention backends of vLLM for GPUs, by the values of ``gpu_attention``."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

NAME = "CUSTOM"
"""vLLM's name for a backend from outside."""

FOLDER = "starling.attention_backends.paged.paged_backend"
CLASSES = {"triton": f"{FOLDER}.TritonBackend", "xformers": f"{FOLDER}.XformersBackend"}


def register_paged_backend(setting: str) -> None:
    """Let vLLM resolve ``NAME`` to the backend of a setting, in this process."""
    register_backend(AttentionBackendEnum[NAME], CLASSES[setting])
