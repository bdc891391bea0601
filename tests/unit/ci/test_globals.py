"""Which names of modules change while a process runs: those below, each with the reason why no object can have it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDERS = ("config", "vllm_compat", "scheduler", "attention_backends", "features", "engine_ext", "lab")

KNOWN = {
    "attention_backends/star/step.py:_current": "the step around the model runner's call, which is vLLM's own to make; "
    "vLLM's forward context is such a name too",
    "config/entry.py:_parsed": "a cache of what was parsed",
    "engine_ext/front/call.py:current_call": "the HTTP request or gRPC call that a coroutine belongs to",
    "engine_ext/front/front_state.py:_states": "by engine, which goes when the engine goes",
    "engine_ext/serving/grpc/bench.py:_channels": "by event loop of vLLM's benchmark, which calls a function",
    "features/library/worker.py:_loaded": "the model is loaded by vLLM, and a connector asks, which has no model",
    "vllm_compat/admission_limits.py:_admitted": "by engine",
    "vllm_compat/admission_limits.py:_arriving": "the request that a coroutine belongs to",
    "vllm_compat/admission_limits.py:_parts": "by engine",
    "vllm_compat/core_process.py:_worker_calls": "who is told of calls of vLLM's, in a function that is wrapped once",
    "vllm_compat/metrics.py:_warned": "a warning is given once",
    "vllm_compat/prefix_cache.py:_make_hasher": "vLLM makes its hasher by a function of a module",
    "vllm_compat/prefix_cache.py:_page_keys": "vLLM makes the keys of pages by a function of a module",
}
EMPTY = ("dict", "list", "set", "defaultdict", "deque", "OrderedDict", "ContextVar", "WeakKeyDictionary", "WeakSet")


def changing_names(source: str) -> Iterator[str]:
    """The names of a module that a function assigns, or that hold a collection that is empty at first."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
    for statement in tree.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if not isinstance(target, ast.Name) or value is None:
            continue
        is_literal = isinstance(value, ast.Dict | ast.List) and not getattr(value, "elts", getattr(value, "keys", ()))
        called = value.func if isinstance(value, ast.Call) else None
        name = getattr(called, "id", getattr(called, "attr", None))
        if is_literal or (name in EMPTY and (name == "ContextVar" or not value.args)):
            yield target.id


def test_no_other_name_of_a_module_carries_state():
    found = {
        f"{path.relative_to(ROOT)}:{name}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for name in changing_names(path.read_text())
    }
    assert found == set(KNOWN)


def test_what_changes_is_found():
    source = """
import weakref
FIXED = {"a": 1}
also_fixed = ()
kept: list[int] = []
by_engine = weakref.WeakKeyDictionary()
current = ContextVar("current", default=None)
changed = 1
def change():
    global changed
    changed = 2
"""
    assert sorted(changing_names(source)) == ["by_engine", "changed", "current", "kept"]
