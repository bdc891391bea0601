"""Filtering of vLLM's logs for users of Starling's commands."""

from __future__ import annotations

import logging

LOGGER, MISSING_TRITON = "vllm.triton_utils.importing", "Triton is installed, but doesn't include CPU backend."


def hide_missing_triton() -> None:
    """Hide that vLLM for CPUs does without Triton, which it logs as the first line of each process.

    Nothing is wrong there: vLLM's CPU code needs no Triton. To be called before vLLM is imported. Goes when vLLM does
    not warn of it.
    """
    logging.getLogger(LOGGER).addFilter(is_no_missing_triton)


def is_no_missing_triton(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(MISSING_TRITON)
