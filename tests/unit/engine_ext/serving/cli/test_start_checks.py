"""Mistakes that `starling serve` refuses before it imports vLLM: one line, exit code 2."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from starling.engine_ext.serving.cli.serve import refuse_taken_port
from starling.engine_ext.serving.cli.serve_args import make_parser, with_nearest
from starling.engine_ext.serving.cli.start_checks import given_options, refuse_mistakes


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def refused(monkeypatch):
    """The message for a command line that is refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def message(*argv: object) -> str:
        with pytest.raises(ValueError) as error:
            refuse_mistakes([str(word) for word in argv])
        return str(error.value)

    return message


def test_what_is_given():
    argv = ["m", "--port=1", "--star_block_size", "64", "-tp", "2", "--headless", "--additional-config.starling.x=1"]
    assert given_options(argv) == {
        "port": "1",
        "star-block-size": "64",
        "headless": None,
        "additional-config.starling.x": "1",
    }
    assert given_options(["--host", "a", "--port", "1", "--port", "2"]) == {"host": "a", "port": "2"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--star", "atuo"], r"star='atuo' is refused: .*, did you mean auto\. Allowed: off, on, auto"),
        (["--live-page", "onn"], r"live_page='onn' is refused: there is no such choice, did you mean on"),
        (["--star-block-size", "12q"], "star_block_size='12q' is refused"),
        (["--additional-config", "{starling: on}"], "--additional-config='{starling: on}' is refused: it is no JSON"),
        (["--additional-config", "[1]"], r"additional_config=\[1\] is refused: it must be an object"),
        (["--additional-config", '{"starling": {"star_blok": 1}}'], "starling.star_blok=1 is refused.*did you mean"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_are_refused(refused, model, argv, says):
    message = refused(model, *argv)
    assert re.search(says, message), message


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--star-block-sise", "512"], "--star-block-sise, did you mean --star-block-size"),
        (["--grpc-prot=5"], "--grpc-prot, did you mean --grpc-port"),
        (["--gpu_memory_utilisation", "0.9"], "--gpu-memory-utilisation"),
        (["--moon-phase", "full"], "--moon-phase"),
        (["--api-kye", "secret"], "--api-kye"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_nobody_has_is_refused_without_its_value(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(["serve", "model", *argv])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {says}\n")


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
def test_a_taken_port_is_refused(host):
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        place = host or "this machine"
        with pytest.raises(OSError, match=f"--port={port} is refused: it can't be used on {place}: Address already in"):
            refuse_taken_port("--port", host, port)
    refuse_taken_port("--port", host, port)
    refuse_taken_port("--grpc-port", host, 0)


def test_what_is_no_port_is_refused():
    with pytest.raises(OSError, match="--port=70000 is refused: it can't be used on this machine"):
        refuse_taken_port("--port", "", 70000)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help=starling"],
        ["./nowhere", "--config", "file.yaml", "--moon"],
        ["s3://bucket/model"],
        ["some/model:Q4_K_M"],
        ["./nowhere", "--load-format", "dummy"],
        ["./nowhere", "--load-f", "dummy"],
        ["org/model", "--download-dir", "/models"],
    ],
    ids=" ".join,
)
def test_what_only_vllm_can_judge_is_left_to_it(monkeypatch, argv):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse_mistakes(argv)


def test_a_name_on_the_hub_is_accepted_where_the_hub_can_be_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    refuse_mistakes(["some/model"])
    refuse_mistakes(["gpt2"])


def test_a_name_in_a_folder_that_is_there_is_a_folders_unless_the_hubs_cache_has_it(model, tmp_path, monkeypatch):
    """Else vLLM asks the hub, which takes half a minute without a network."""
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path.name
    refuse_mistakes([f"{folder}/{model.name}"])
    name = f"{folder}/tiny-modell"
    says = f"MODEL='{name}' is refused: there is no such folder in {folder}/, nor such a model in the cache of the hub"
    with pytest.raises(ValueError, match=re.escape(f"{says}, did you mean {folder}/{model.name}. Allowed: the folder")):
        refuse_mistakes([name])
    with pytest.raises(ValueError, match=f"where there is no folder {folder}/"):
        refuse_mistakes([f"{folder}/nowhere", "--port", "1"])
    (tmp_path / "hub" / f"models--{folder}--tiny-modell").mkdir(parents=True)
    refuse_mistakes([name])
    with monkeypatch.context() as modelscope:
        modelscope.setenv("VLLM_USE_MODELSCOPE", "1")
        refuse_mistakes([f"{folder}/nowhere"])


def test_a_model_that_is_not_there_is_refused_before_vllm_is_imported(tmp_path):
    """By the command, which asks no hub for it."""
    (tmp_path / "models").mkdir()
    code = (
        "import sys; from starling.engine_ext.serving.cli import main; "
        "code = main.main(['serve', 'models/nowhere']); print(code, 'vllm' in sys.modules, 'torch' in sys.modules)"
    )
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "2 False False\n", done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "MODEL='models/nowhere' is refused: there is no such folder in models/" in line


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
    assert with_nearest(message) == message + near


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
