"""ASGI middleware: bounds on a request's body, which are checked before vLLM makes objects of it.

The event loop parses a body, and all clients wait meanwhile. vLLM has no bound, and pydantic notes each wrong value
once for each kind that the value could have: a body of 1 MiB, `{"messages": [{}, {}, ...]}`, took 4 GB and 7 seconds.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator
from starlette.responses import JSONResponse
from starlette.routing import Match
from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.bounds import (
    BODY,
    OTHER_VALUES,
    REQUEST_ID,
    SCORING_BODY,
    TOKEN_VALUES,
    Bound,
    shortened,
)

FEW_VALUES = 1024
"""Number of values up to which a body is cheap, whatever they are."""

INVOCATIONS, INVOCATION_VALUES = "/invocations", 4096
"""Path on which vLLM tries several request models, each with a list of all errors, and the most values of its body."""

SCORING = "/generative_scoring"
"""Path whose texts vLLM tokenises in the event loop."""

TOKEN_FIELDS = ("prompt", "prompt_token_ids", "token_ids", "tokens", "input")
"""Fields that may hold the tokens of prompts."""

Receive = Callable[[], Any]


class BoundBody:
    """Middleware around ``app`` that checks the bounds."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or is_form(scope):
            await self.app(scope, receive, send)
            return
        try:
            check_request_id(scope)
            body = await whole_body(receive, SCORING_BODY if scope["path"].endswith(SCORING) else BODY)
            if body is not None:
                check_body(body, scope)
        except VLLMValidationError as error:
            status = 413 if error.parameter in (BODY.field, SCORING_BODY.field) else 400
            await refusal(shortened(str(error.args[0])), status, error.parameter)(scope, receive, send)
            return
        if body is not None:  # else the client has left
            await self.app(scope, with_body(body, receive), send)


def refusal(message: str, status: int, parameter: str | None) -> JSONResponse:
    """Return an error as vLLM's server answers it."""
    error = {"message": message, "type": "BadRequestError", "param": parameter, "code": status}
    return JSONResponse({"error": error}, status, {"connection": "close"} if status == 413 else None)


def is_form(scope: Any) -> bool:
    """Return whether a request uploads files, which Starlette reads to the disk, with bounds of its own."""
    return any(name == b"content-type" and value.startswith(b"multipart/") for name, value in scope["headers"])


def check_request_id(scope: Any) -> None:
    """Check the header that names the request in vLLM's log and engine (raises VLLMValidationError)."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            REQUEST_ID.check(len(value))


async def whole_body(receive: Receive, bound: Bound) -> bytes | None:
    """Return the body of a request, or None if its client has left.

    Raises:
        VLLMValidationError: the body is above its bound.
    """
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        bound.check(size)
        more = message.get("more_body", False)
    return b"".join(parts)


def with_body(body: bytes, receive: Receive) -> Receive:
    """Return a request's ``receive`` that begins with its body."""
    given = False

    async def receive_again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def most_values(body: bytes) -> int:
    """Return an upper bound of the number of values in a JSON text: the counted signs may also be in its strings."""
    return body.count(b",") + body.count(b"[") + body.count(b"{") + 1


def may_have_half_pairs(body: bytes) -> bool:
    """Return whether a JSON text may have half of a surrogate pair, which UTF-8 can't encode, or is not UTF-8.

    Python's parser accepts them all. vLLM then fails with 500 if it sends a text on to its engine, or back.
    """
    return not is_utf8(body) or b"\0" in body or b"\\ud" in body or b"\\uD" in body


def half_pair_in(body: bytes) -> str | None:
    """Return the field of a JSON object with half of a surrogate pair, or None if there is no field or no object."""
    name = None
    try:
        fields = json.loads(body)
        for name, value in fields.items() if isinstance(fields, dict) else ():
            json.dumps([name, value], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None if name is None else name.encode(errors="replace").decode()
    except (ValueError, RecursionError):
        pass
    return None


def is_utf8(body: bytes) -> bool:
    try:
        return body.isascii() or bool(body.decode())
    except UnicodeDecodeError:
        return False


def check_body(body: bytes, scope: Any) -> None:
    """Check a JSON body's number of values, and everything that can be checked of them without a list of all errors.

    Raises:
        VLLMValidationError: the body is above a bound, is no JSON, or has a value that the path does not take.
    """
    most, tokens = most_values(body), token_bound(scope)
    Bound(BODY.field, 2 * tokens.limit, "commas and brackets").check(most)
    try:
        content = msgspec.json.decode(body) if most > FEW_VALUES or may_have_half_pairs(body) else None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        if (name := half_pair_in(body)) is not None:
            reason = "its text has half of a surrogate pair, which is no character. Allowed: text that UTF-8 can say"
            raise VLLMValidationError(f"{name} is refused: {reason}.", parameter=name) from None
        raise VLLMValidationError(f"The body is no valid JSON: {error}. It must be UTF-8.") from None
    if most <= FEW_VALUES:
        return
    num_values = check_values(content, tokens)
    if num_values <= FEW_VALUES:
        return
    validator = validator_of(endpoint_of(scope))
    if validator is None:
        if scope["path"].endswith(INVOCATIONS):
            Bound(BODY.field, INVOCATION_VALUES, f"values on {INVOCATIONS}").check(num_values)
        return
    try:
        validator.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise VLLMValidationError(f"{where}: {first['msg']}", parameter=str(first["loc"][0])) from None
    except Exception:  # vLLM's own validators raise what they like, and do so again
        return


def token_bound(scope: Any) -> Bound:
    """Return the bound of token ids for the model of this server."""
    model = getattr(scope["app"].state.engine_client, "model_config", None)
    return Bound(TOKEN_VALUES.field, max(TOKEN_VALUES.limit, 2 * getattr(model, "max_model_len", 0)), "values")


def check_values(content: Any, tokens: Bound) -> int:
    """Return the number of values in a JSON value, including those in its lists and objects, but without its token ids.

    Numbers and texts in lists of TOKEN_FIELDS count as token ids.

    Raises:
        VLLMValidationError: there are too many, of one kind or the other.
    """
    num_tokens = num_others = 0
    left = [(content, False)]
    while left:
        value, has_tokens = left.pop()
        is_object = isinstance(value, dict)
        kinds = set(map(type, value.values() if is_object else value))
        inner = []
        if kinds & {dict, list}:
            OTHER_VALUES.check(len(value))
            items = value.items() if is_object else enumerate(value)
            inner = [
                (each, has_tokens or (value is content and name in TOKEN_FIELDS))
                for name, each in items
                if isinstance(each, (dict, list))
            ]
        if is_object or not has_tokens:
            num_others += len(value)
        else:
            num_others, num_tokens = num_others + len(inner), num_tokens + len(value) - len(inner)
        tokens.check(num_tokens)
        OTHER_VALUES.check(num_others)
        left += inner
    return num_others


def endpoint_of(scope: Any) -> Any:
    """Return the function that answers a request, or None if the server has no path for it."""
    for route in scope["app"].routes:
        match, inner = route.matches(scope)
        if match == Match.FULL:
            return inner.get("endpoint")
    return None


@functools.cache
def validator_of(endpoint: Any) -> SchemaValidator | None:
    """Return a validator of the bodies of an endpoint's requests that stops at the first wrong value of each list.

    Returns:
        The validator, or None if the endpoint does not say what it takes, or is an application of its own.
    """
    if not inspect.isroutine(endpoint):
        return None
    try:
        annotations = typing.get_type_hints(inspect.unwrap(endpoint)).values()
    except NameError:  # one that is there for type checkers only
        return None
    for annotation in annotations:
        kinds = typing.get_args(annotation) or (annotation,)
        if all(inspect.isclass(kind) and issubclass(kind, BaseModel) for kind in kinds):
            return SchemaValidator(fail_fast(TypeAdapter(annotation).core_schema))
    return None


def fail_fast(schema: Any) -> Any:
    """Return a pydantic core schema whose lists end at their first wrong value, as FailFast makes a single list do."""
    if isinstance(schema, dict):
        changed = {key: fail_fast(value) for key, value in schema.items()}
        return changed | {"fail_fast": True} if schema.get("type") == "list" else changed
    if isinstance(schema, (list, tuple)):
        return type(schema)(fail_fast(value) for value in schema)
    return schema
