"""What `starling serve` says at its start, and of a model or options that vLLM refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from benchmarks.random_llama import make_random_llama
from starling.config.star import StarOptions, parse_options, summary
from starling.engine_ext.serving.cli import serve
from starling.engine_ext.start.activation import CORE
from starling.vllm_compat.config import plain_message
from starling.vllm_compat.core_process import add_report
from tests.parity.harness import TINY


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "star=off, Star Attention for requests that turn it on"),
        (
            {"star": "auto", "star_min_tokens": "16K", "star_block_size": "n/8"},
            "star=auto, Star Attention for prompts of 16,384 tokens or more; star_block_size=n/8",
        ),
        ({"star": "on"}, "star=on, Star Attention for all prompts"),
    ],
)
def test_the_line_of_the_star_options(options, line):
    assert summary(parse_options(options)) == line


def test_the_modes_have_a_meaning_each():
    assert {summary(StarOptions(mode=mode))[:8] for mode in ("off", "on", "auto")} == {
        "star=off",
        "star=on,",
        "star=aut",
    }


def test_the_line_of_the_kv_room():
    parallel = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2))
    planner = SimpleNamespace(page_size=128, num_pages=100, vllm_config=parallel)
    assert serve.kv_room(planner) == "KV pages of 128 tokens, room for 25,600 tokens"
    planner.page_size = None
    assert serve.kv_room(planner) == "KV pages of several sizes"


@pytest.mark.parametrize(
    ("grpc", "host", "cert", "line"),
    [
        (None, None, None, "HTTP on http://0.0.0.0:8000, no gRPC (--grpc-port)"),
        (
            "127.0.0.1:5",
            None,
            None,
            "HTTP on http://0.0.0.0:8000, gRPC on 127.0.0.1:5 (plaintext, for this machine only: --host serves others)",
        ),
        ("a:5", "a", "c.pem", "HTTP on http://0.0.0.0:8000, gRPC on a:5 (TLS)"),
    ],
)
def test_the_line_of_the_addresses(grpc, host, cert, line):
    assert serve.addresses("http://0.0.0.0:8000", grpc, Namespace(host=host, ssl_certfile=cert)) == line


FRONT = {
    "api_server_count": None,
    "data_parallel_size": 1,
    "data_parallel_external_lb": False,
    "data_parallel_multi_port_external_lb": False,
    "data_parallel_rank": None,
    "data_parallel_start_rank": None,
    "headless": False,
    "grpc": False,
}


@pytest.mark.parametrize(
    ("given", "one"),
    [
        ({}, True),
        ({"api_server_count": 1, "data_parallel_size": 2}, True),
        ({"data_parallel_size": 2}, False),
        ({"api_server_count": 2}, False),
        ({"headless": True}, False),
        ({"grpc": True}, False),
        ({"data_parallel_rank": 0}, False),
        ({"data_parallel_multi_port_external_lb": True}, False),
    ],
)
def test_which_servers_are_one_front(given, one):
    assert serve.is_one_front(Namespace(**FRONT | given)) == one


class Model(BaseModel):
    path: str

    @field_validator("path")
    @classmethod
    def check(cls, path):
        raise ValueError(f"no model at {path}")


def test_an_error_of_pydantic_is_shown_without_its_frame():
    with pytest.raises(ValidationError) as refused:
        Model(path="x")
    assert plain_message(refused.value) == "no model at x"
    assert plain_message(OSError("no file")) == "no file"


def create_engine_config():
    raise ValueError("no such model")


def crash():
    raise ValueError("a mistake of the server's own")


@pytest.fixture
def prepared(monkeypatch):
    """serve.run up to the start of the engine, which ``start`` is."""

    def prepare(start):
        args = Namespace(**FRONT, model="m", model_tag=None, uds=None, host=None, port=0)
        monkeypatch.setattr(serve, "set_defaults", lambda environ: None)
        monkeypatch.setattr(serve, "parse", lambda argv: (args, None))
        for name in ("set_up_environment", "on_server_socket", "refuse_open_plaintext", "configure_logging_from_args"):
            monkeypatch.setattr(serve, name, lambda *_: None)
        for name in ("validate_serve_args", "bind_cores", "fit_memory"):
            monkeypatch.setattr(serve, name, lambda *_: None)
        monkeypatch.setattr(serve, "serve_both", lambda *_: start)
        monkeypatch.setattr(serve.uvloop, "run", lambda start: start())

    return prepare


def test_a_model_that_vllm_refuses_is_one_line_and_exit_code_2(prepared, capsys):
    prepared(create_engine_config)
    assert serve.run([]) == 2
    assert capsys.readouterr().err == "starling serve: error: no such model\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--headless", "--api-server-count", "2"], "--api-server-count=2 cannot be used with --headless"),
        (["--data-parallel-rank", "0", "--data-parallel-hybrid-lb"], "more than one data parallel load balancing mode"),
    ],
)
def test_options_that_vllms_launcher_refuses_are_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, options, says):
    """The launcher is vLLM's own: it raises before it makes an engine."""
    for name in ("set_defaults", "bind_cores", "fit_memory", "refuse_taken_port"):
        monkeypatch.setattr(serve, name, lambda *_: None)
    model = make_random_llama(tmp_path / "tiny", **TINY)
    assert serve.run([str(model), *options, "--data-parallel-size", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("starling serve: error: ") and says in error


def test_an_error_of_a_running_server_keeps_its_traceback(prepared):
    prepared(crash)
    with pytest.raises(ValueError, match="a mistake of the server"):
        serve.run([])


def test_a_server_does_not_start_where_the_plugin_does_not_load(prepared, monkeypatch, capsys):
    """vLLM logs it, and would serve without salts."""
    prepared(create_engine_config)
    monkeypatch.setitem(sys.modules, serve.PLUGIN, None)
    assert serve.run([]) == 2
    message = "error: Starling is not in this vLLM: the plugin does not load: ModuleNotFoundError: import of"
    assert capsys.readouterr().err.startswith(f"starling serve: {message}")


def test_a_server_does_not_start_where_vllm_does_not_find_the_plugin(prepared, monkeypatch, capsys):
    prepared(create_engine_config)
    monkeypatch.setattr(serve, "entry_points", lambda group: ())
    assert serve.run([]) == 2
    assert "no installed package has the entry point `starling` of vllm.general_plugins" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("is_hooked", "reports", "says"),
    [
        (True, 2, None),
        (False, 2, "this process runs vLLM's own front"),
        (True, 1, "1 of 2 engine cores run vLLM's own scheduler"),
    ],
)
def test_a_server_does_not_listen_without_hooks(monkeypatch, is_hooked, reports, says):
    config = Namespace()
    for _ in range(reports):
        add_report(config, {})
    engine = Namespace(vllm_config=config, engine_core=Namespace(core_engines=[0, 1]))
    monkeypatch.setattr(serve, "is_hooked", lambda: is_hooked)
    with nullcontext() if says is None else pytest.raises(serve.NotHooked, match=says):
        serve.check_hooks(engine)


BROKEN = """
import importlib.abc, sys


class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "starling.engine_ext.start.plugin":
            raise ImportError("a dependency is broken")


sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("start", "code"),
    [
        ("import sys; from starling.engine_ext.serving.cli.main import main; sys.exit(main(['serve', 'm']))", 2),
        (f"from vllm.plugins import load_general_plugins as load; load(); import {CORE}", 1),
    ],
    ids=["front", "engine core"],
)
def test_no_process_of_a_server_runs_without_the_plugin(tmp_path, start, code):
    """With an import error in every process: the front ends with a message, and an engine core has no scheduler."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", start],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert "a dependency is broken" in done.stderr.splitlines()[-1]
