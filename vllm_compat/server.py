"""Functions of vLLM's server whose module is another one in vLLM 0.33. Goes when vLLM 0.32 is no longer supported."""

from __future__ import annotations

from vllm_compat.patching import first_found

default_chat_template_kwargs = first_found(
    "vllm.entrypoints.common.cli_args:resolve_default_chat_template_kwargs",
    "vllm.entrypoints.launchers.cli_args:resolve_default_chat_template_kwargs",
)
"""From the server's arguments: the keyword arguments that every chat template gets."""

validate_serve_args = first_found(
    "vllm.entrypoints.common.cli_args:validate_parsed_serve_args",
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args",
)
"""Raises TypeError or ValueError for arguments of `vllm serve` that exclude one another."""

set_up_environment = first_found(
    "vllm.entrypoints.common.startup:cli_env_setup",
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup",
)
"""Sets the environment variables that every `vllm` command sets at its start."""
