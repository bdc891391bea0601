"""Requests that schemathesis draws from a server's OpenAPI schema, some of them with Starling's options."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.e2e.fuzz_http import OPTIONS, without_options

LEFT_OUT = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep", "/pause", "/start_")
"""Beginnings of paths that change the server for other requests, and of those that are no API."""


def cases(url: str) -> st.SearchStrategy:
    """Requests to any operation of the server; for schemathesis each is a Case."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in operations if not operation.path.startswith(LEFT_OUT)]
    options = OPTIONS.filter(is_json)
    return st.sampled_from(operations).flatmap(lambda each: st.builds(with_options, each.as_strategy(), options))


def is_json(value: Any) -> bool:
    """Whether a value is JSON: the client of schemathesis sends no other, and infinity is none."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def with_options(case: Any, options: Any) -> Any:
    if isinstance(case.body, dict):
        case.body = case.body | {"vllm_xargs": options, "max_tokens": 2}
    return case


def status(case: Any, plain: bool = False) -> int:
    """The status of the response.

    Args:
        plain: leave Starling's options out.
    """
    if plain and isinstance(case.body, dict):
        case.body = without_options(case.body)
    return case.call(timeout=120).status_code
