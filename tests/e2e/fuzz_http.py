"""Hypothesis strategies for HTTP requests with Starling's options: valid, invalid and extreme ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from starling.config.star import FIELD_OF
from starling.scheduler.planning.request_metadata import KEY
from tests.e2e.serving import MODEL, PAGE_SIZE

NUMBERS = [-(2**63), -1, 0, 1, 2, 7, PAGE_SIZE, 2**31, 2**63, 2**64, 10**30]
FLOATS = [-0.0, 0.5, 1.0, 1e300, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", "on", "off", "auto", "32", "\x00", "\ud800", "x" * 2000]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *FLOATS, *TEXTS])


def nested(depth: int) -> Any:
    """A list in a list, and so on; Python's JSON parser refuses more than about a thousand."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["", "type", "a"]), SCALARS | st.lists(SCALARS, max_size=1), max_size=2),
    st.sampled_from([40, 500]).map(nested),
)

SIZES = st.sampled_from([0, PAGE_SIZE, 2 * PAGE_SIZE])
VALID = st.fixed_dictionaries(
    {"star": st.sampled_from(["on", "auto"])},
    optional={
        "star_min_tokens": st.sampled_from([0, 10]),
        "star_block_size": st.sampled_from([2 * PAGE_SIZE, "n/4"]),
        "star_anchor_size": SIZES,
        "star_overlap_size": SIZES,
        "star_query_tokens": st.integers(0, 60),
        "star_replicas": st.sampled_from(["auto", 1]),
        "star_segments": st.sampled_from(["auto", "off", "a"])
        | st.lists(st.integers(0, 250), max_size=6, unique=True).map(sorted),
        "star_shards": st.just("off"),
    },
)
NAMES = st.sampled_from([*sorted(FIELD_OF), "star_unknown", "block_size", "stat_segments", KEY, "theirs"])
OPTIONS = st.one_of(
    VALID,
    st.dictionaries(NAMES, SCALARS, max_size=4),
    st.builds(lambda valid, name, value: valid | {name: value}, VALID, NAMES, VALUES),
    VALUES,
)
"""Values of ``vllm_xargs``."""

TOKENS = [(index * 7 + index // 3) % 250 for index in range(200)]
TEXT = "".join(chr(ord("a") + token % 26) for token in TOKENS)
MESSAGES = [{"role": "user", "content": TEXT}]
PATHS = {
    "/v1/completions": {"model": MODEL, "prompt": TOKENS, "max_tokens": 2},
    "/v1/chat/completions": {"model": MODEL, "messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": TEXT, "max_output_tokens": 2},
    "/v1/messages": {"model": MODEL, "messages": MESSAGES, "max_tokens": 2},
    "/inference/v1/generate": {"model": MODEL, "token_ids": TOKENS},
}


def options_of(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The object of a request that holds Starling's options, and their key there."""
    return (body["sampling_params"], "extra_args") if "token_ids" in body else (body, "vllm_xargs")


@st.composite
def requests(draw: st.DrawFn, fields: dict[str, list[str]]) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request that is valid but for the options and up to two more fields.

    Args:
        fields: path -> the fields that a request of that path may have.
    """
    path = draw(st.sampled_from(sorted(PATHS)))
    body = dict(PATHS[path])
    if "token_ids" in body:
        body["sampling_params"] = {"max_tokens": 2}
    of, key = options_of(body)
    of[key] = draw(OPTIONS)
    return path, body | draw(st.dictionaries(st.sampled_from(fields[path]), VALUES, max_size=2))


def encode(body: Any) -> bytes:
    """The JSON of a request, with the numbers that Python's parser takes and JSON does not have (NaN)."""
    return json.dumps(body).encode()


def without_options(body: dict[str, Any]) -> dict[str, Any]:
    """The same request to vLLM alone: its arguments for other plugins stay."""
    plain = json.loads(json.dumps(body))
    for of, key in ((plain, "vllm_xargs"), (plain.get("sampling_params"), "extra_args")):
        if isinstance(of, dict) and key in of:
            given = of.pop(key)
            if isinstance(given, dict):
                of[key] = {name: value for name, value in given.items() if name not in (*FIELD_OF, KEY)}
    return plain


def body_fields(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Path -> the fields of its request, from a server's OpenAPI schema."""
    fields = {}
    for path in PATHS:
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        fields[path] = sorted(schema["components"]["schemas"][name]["properties"])
    return fields
