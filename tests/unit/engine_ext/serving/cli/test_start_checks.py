"""Mistakes that `starling serve` refuses before it imports vLLM: one line, exit code 2."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest

from examples.server import free_ports
from starling.engine_ext.serving.cli import start_checks
from starling.engine_ext.serving.cli.serve_args import OWN_OPTIONS, make_parser, nearest_choice
from starling.engine_ext.serving.cli.start_checks import given_options, refuse_mistakes, refuse_taken_port
from starling.vllm_compat.options import serve_options, stem


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def refused(monkeypatch):
    """The message for a command line that is refused, and the options that are put behind it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (port,) = free_ports(0)

    def message(*argv: object) -> str:
        given = [str(word) for word in argv]
        with pytest.raises((ValueError, OSError)) as error:
            refuse_mistakes([*given, *([] if "--port" in given else ["--port", str(port)])])
        return str(error.value)

    return message


def test_every_option_of_the_parser_is_known():
    """Else an option that exists would be refused: those of vLLM are read from its source."""
    serve = make_parser()._subparsers._group_actions[0].choices["serve"]
    names = {option[2:] for action in serve._actions for option in action.option_strings if option.startswith("--")}
    stems = {stem(name) for name in serve_options() | OWN_OPTIONS}
    assert {name for name in names if stem(name) not in stems} <= {"help"}
    short = {
        action.dest for action in serve._actions if any(not option.startswith("--") for option in action.option_strings)
    }
    assert not short & {"model", "port", "host", "uds", "headless", "grpc", "grpc_port", "additional_config"}


def test_what_is_given():
    known = {"port", "host", "tensor-parallel-size", "tensor-parallel-rank"}
    argv = ["m", "--port=1", "--star_block_size", "64", "-tp", "2", "--headless", "--additional-config.starling.x=1"]
    assert given_options(argv, known) == {
        "port": "1",
        "star-block-size": "64",
        "headless": None,
        "additional-config.starling.x": "1",
    }
    assert given_options(["--hos", "a", "--tensor-p", "2", "--port", "1", "--port", "2"], known) == {
        "host": "a",
        "tensor-p": "2",
        "port": "2",
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--star-block-sise", "512"], "--star-block-sise is refused: .*, did you mean --star-block-size"),
        (["--grpc-prot=5"], "--grpc-prot is refused: .*, did you mean --grpc-port"),
        (["--gpu_memory_utilisation", "0.9"], "did you mean --gpu-memory-utilization"),
        (["--moon-phase"], r"--moon-phase is refused: there is no such option\. Allowed: those of `starling serve"),
        (["--star", "atuo"], r"star='atuo' is refused: .*, did you mean auto\. Allowed: off, on, auto"),
        (["--live-page", "onn"], r"live_page='onn' is refused: there is no such choice, did you mean on"),
        (["--star-block-size", "12q"], "star_block_size='12q' is refused"),
        (["--additional-config", "{starling: on}"], "--additional-config='{starling: on}' is refused: it is no JSON"),
        (["--additional-config", "[1]"], r"additional_config=\[1\] is refused: it must be an object"),
        (["--additional-config", '{"starling": {"star_blok": 1}}'], "starling.star_blok=1 is refused.*did you mean"),
        (["--port", "80x"], r"--port='80x' is refused: it is no port\. Allowed: 0 to 65535"),
        (["--grpc-port", "70000"], r"--grpc-port='70000' is refused: it is no port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_are_refused(refused, model, argv, says):
    message = refused(model, *argv)
    assert re.search(says, message), message


def test_the_value_of_an_unknown_option_is_not_shown(refused, model):
    assert "secret" not in refused(model, "--api-kye", "secret")


def test_models_that_are_not_there(refused, model, tmp_path):
    missing = tmp_path / "tiny-modell"
    assert f"MODEL='{missing}' is refused: there is no such folder, did you mean {model}." in refused(missing)
    (tmp_path / "empty").mkdir()
    assert "the folder has neither config.json nor params.json" in refused(tmp_path / "empty")
    assert "there is no such folder. Allowed" in refused("./nowhere")
    assert "there is no such folder. Allowed" in refused("a/b/c")
    assert "there is no such folder, nor such a model in the cache of the hub" in refused("some/model")
    assert "MODEL='./nowhere' is refused" in refused("--model", "./nowhere")


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_taken_port_is_refused(refused, model, host):
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port} is refused: it can't be used on this machine: Address" in refused(model, "--port", port)
        own = refused(model, "--grpc-port", port)
        assert f"--grpc-port={port} is refused: it can't be used on 127.0.0.1: Address already in use. Allowed" in own
        refuse_mistakes([str(model), "--port", str(port), "--headless"])
        refuse_mistakes([str(model), "--port", str(port)], serves=False)
    refuse_taken_port("--port", host, port)


def test_a_port_is_of_one_server(refused, model):
    (port,) = free_ports(0)
    message = refused(model, "--grpc-port", port, "--grpc-admin-port", port)
    assert message.startswith(
        f"--grpc-admin-port={port} is refused: --grpc-port is the same. Allowed: a port of its own"
    )
    refuse_mistakes([str(model), "--port", "0", "--grpc-port", "0", "--grpc-admin-port", "0"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--help=starling"],
        ["./nowhere", "--config", "file.yaml", "--moon"],
        ["s3://bucket/model"],
        ["some/model:Q4_K_M"],
        ["./nowhere", "--load-format", "dummy"],
        ["org/model", "--download-dir", "/models"],
    ],
    ids=" ".join,
)
def test_what_only_vllm_can_judge_is_left_to_it(monkeypatch, argv):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse_mistakes([*argv, "--port", str(*free_ports(0))])


def test_a_name_on_the_hub_is_accepted_where_the_hub_can_be_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    refuse_mistakes(["some/model", "--port", str(*free_ports(0))])


def test_options_are_left_to_vllm_where_a_platform_may_add_some(monkeypatch, model):
    monkeypatch.setattr(start_checks, "serve_options", frozenset)
    refuse_mistakes([str(model), "--moon-phase", "full", "--port", str(*free_ports(0))])


@pytest.mark.parametrize(
    ("message", "near"),
    [
        ("argument --dtype: invalid choice: 'bfloat17' (choose from 'auto', 'bfloat16')", ", did you mean bfloat16"),
        ("argument --dtype: invalid choice: 'bfloat17' (choose from auto, bfloat16)", ", did you mean bfloat16"),
        ("argument --dtype: invalid choice: 'x' (choose from auto, bfloat16)", ""),
        ("expected one argument", ""),
    ],
)
def test_the_nearest_choice_of_a_vllm_option(message, near):
    assert nearest_choice(message) == near


def test_a_mistake_is_one_line_without_vllm(tmp_path):
    code = (
        "import sys; from starling.engine_ext.serving.cli import main as cli\n"
        f"code = cli.main(['serve', {str(tmp_path / 'no')!r}])\n"
        "print(code, 'vllm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "2 False False\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("starling serve: error: MODEL=")


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    from starling.engine_ext.serving.cli import main as cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["srve"])
    assert ended.value.code == 2
    assert "there is no command 'srve', did you mean serve. Allowed: serve, doctor" in capsys.readouterr().err
