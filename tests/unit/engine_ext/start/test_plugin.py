"""vLLM's entry point into Starling: what it hooks, and what it does beside another vLLM."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from vllm.engine import arg_utils

from starling.engine_ext.start import plugin
from starling.vllm_compat import versions


def test_beside_another_vllm_nothing_is_hooked_and_options_fail(monkeypatch, caplog):
    """Registration warns and goes on; an engine that asks for Starling fails with what to install."""
    hooks = []
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.31.0")
    monkeypatch.setattr(plugin, "on_engine_config", lambda before, after: hooks.append(before))
    monkeypatch.setattr(plugin.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "vllm.starling"):
        plugin.register.__wrapped__()
    assert "0.31.0 is outside" in caplog.text
    (before,) = hooks
    before(type("Args", (), {"additional_config": {}}))
    with pytest.raises(ValueError, match=r"install vllm>=0\.32"):
        before(type("Args", (), {"additional_config": {"starling": {}}}))


def test_a_vllm_without_an_engine_configuration_is_only_warned_about(monkeypatch, caplog):
    def missing(before, after):
        raise ImportError("no vllm.engine.arg_utils")

    monkeypatch.setattr(versions, "vllm_version", lambda: None)
    monkeypatch.setattr(plugin, "on_engine_config", missing)
    monkeypatch.setattr(plugin.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "vllm.starling"):
        plugin.register.__wrapped__()
    assert "vLLM is not installed" in caplog.text
    assert "options are not read" in caplog.text


@pytest.mark.parametrize(("kind", "hooked"), [("AsyncEngineArgs", True), ("EngineArgs", False)])
def test_a_server_that_only_makes_an_engine_is_hooked(kind, hooked, monkeypatch):
    """One of several API servers is a process of its own, which gets arguments that another process has parsed."""
    callbacks, hooks = {}, []
    monkeypatch.setattr(plugin, "on_engine_config", lambda before, after: callbacks.update(after=after))
    monkeypatch.setattr(plugin, "on_server_args", lambda callback: None)
    monkeypatch.setattr(plugin, "on_processed_request", lambda callback: hooks.append("resolve"))
    monkeypatch.setattr(plugin, "on_request_output", lambda plan_of, key, note: hooks.append(plan_of.__name__))
    monkeypatch.setattr(plugin, "on_generate", lambda prepare, around: hooks.append(around.__name__))
    monkeypatch.setattr(plugin, "on_encode", lambda prepare: hooks.append(prepare.__name__))
    monkeypatch.setattr(plugin, "on_openai_request", lambda *checks: hooks.extend(each.__name__ for each in checks))
    monkeypatch.setattr(plugin, "on_beam_search", lambda callback: hooks.append(callback.__name__))
    monkeypatch.setattr(plugin, "on_error_text", lambda *texts: hooks.extend(each.__name__ for each in texts))
    monkeypatch.setattr(plugin, "on_rendered_chat", lambda wanted, add: hooks.append(add.__name__))
    plugin._hook_in()
    callbacks["after"](object.__new__(getattr(arg_utils, kind)), SimpleNamespace(additional_config={}))
    of_requests = ["openai_request", "check_unknown", "begin_beam_search", "explained", "shortened", "add_segments"]
    of_servers = ["generate_for_client", "with_salt", *of_requests]
    assert hooks == ["resolve", "plan_of_request", *(of_servers if hooked else [])]


def test_pooling_requests_are_not_planned(monkeypatch):
    callbacks = {}
    monkeypatch.setattr(plugin, "on_engine_config", lambda before, after: callbacks.update(after=after))
    monkeypatch.setattr(plugin, "on_server_args", lambda callback: None)
    monkeypatch.setattr(plugin, "on_processed_request", lambda callback: callbacks.update(resolve=callback))
    monkeypatch.setattr(plugin, "on_request_output", lambda plan_of, key, note: None)
    plugin._hook_in()
    callbacks["after"](object.__new__(arg_utils.EngineArgs), SimpleNamespace(additional_config={}))
    callbacks["resolve"]("an input processor that is not read", SimpleNamespace(sampling_params=None), None)


def test_a_server_gets_the_middleware_and_a_benchmark_has_none(monkeypatch):
    callbacks = []
    monkeypatch.setattr(plugin, "on_engine_config", lambda before, after: None)
    monkeypatch.setattr(plugin, "on_server_args", callbacks.append)
    plugin._hook_in()
    (server_args,) = callbacks
    server = SimpleNamespace(additional_config={"starling": {}}, middleware=[])
    server_args(server)
    assert server.middleware
    server_args(SimpleNamespace(additional_config={"starling": {}}))


WITHOUT = """
import sys
from importlib import import_module

missing, using, *others = sys.argv[1:]
sys.modules[missing] = None
for name in others:
    import_module(f"starling.{name}")
try:
    import_module(f"starling.{using}")
except ImportError as error:
    print(error)
"""
PROCESSES = (
    *("start.plugin", "start.activation", "serving.http.middleware", "serving.http.live_page", "front.requests"),
    *("front.llm", "engine_core", "worker.star_worker", "serving.cli.serve"),
)
SERVER = [f"engine_ext.{name}" for name in PROCESSES]


@pytest.mark.parametrize(
    ("missing", "using", "others"),
    [
        ("grpc", "engine_ext.serving.grpc.server", SERVER),
        (
            "xformers",
            "attention_backends.kernels.xformers_paged",
            [*SERVER, "attention_backends.paged.paged_backend", "lab.doctor.doctor", "lab.selftest.selftest"],
        ),
    ],
    ids=["a server without a gRPC port", "an installation without the extra xformers"],
)
def test_processes_import_only_what_they_use(missing, using, others):
    """All other modules load where this one can't be imported."""
    command = [sys.executable, "-c", WITHOUT, missing, using, *others]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert missing in found.stdout
