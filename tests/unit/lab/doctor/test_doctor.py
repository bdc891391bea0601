"""`starling doctor` without a server: one JSON object, the plan's numbers, and reasons."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers import ChatParams

from benchmarks.attamba.random_model import make_random_attamba
from benchmarks.random_llama import make_random_llama
from starling.config.star import StarOptions
from starling.engine_ext.start import plugin
from starling.lab.doctor import doctor as doctor
from starling.scheduler.planning.facts import EngineFacts
from starling.scheduler.planning.plan import StarPlan, dense_keys, keys_attended, summary
from starling.vllm_compat.versions import vllm_version
from tests.forks import FORK_SHIM, path_with, run_in_fork
from tests.parity.harness import TINY
from tests.parity.hybrid_models import make_random_hybrid
from tests.unit.engine_ext.front.test_chat_segments import COUNTED


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return str(make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY))


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "starling.engine_ext.serving.cli.main", "doctor", *arguments, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def examine(*arguments: str, **env: str) -> dict:
    """The report. Standard output is one JSON object, although vLLM and its libraries print there."""
    imports = ("vllm.engine.arg_utils", "vllm.renderers", "starling.engine_ext.serving.cli.serve_args")
    command = ("starling.engine_ext.serving.cli.main:main", "doctor", *arguments, "--json")
    done = run_in_fork(*command, imports=imports, before={"PYTHONPATH": path_with(FORK_SHIM)}, env=env, seconds=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_prompts_plan_memory_and_work(model):
    """In a process that has imported nothing, as a user runs it."""
    done = run(model, "--prompt-tokens", "3000", "--dtype", "float32", "--star-block-size", "512")
    report = json.loads(done.stdout)
    plan = StarPlan(512, 128, 384, 3000 - 512, 3000)
    bytes_per_token = 2 * 2 * 2 * 32 * 4  # K and V, layers, KV heads, head size, float32
    assert report["kv_cache"] == {
        "page_tokens": 128,
        "page_bytes": 128 * bytes_per_token,
        "bytes_per_token": bytes_per_token,
    }
    assert report["attention_backend"]["name"] == "CPU_ATTN"
    assert report["cuda_graphs"]["mode"] == "NONE"
    assert report["star_defaults"]["block_size"] == 512
    assert report["star_refused"] == []
    assert report["star_block_reuse"] == "yes, of prompts without an overlap: star_overlap_size=0, or documents"
    prompt = report["prompt"]
    assert (prompt["kv_pages"], prompt["kv_bytes"]) == (24, 24 * 128 * bytes_per_token)
    assert (prompt["decode_step"]["keys"], prompt["decode_step"]["bytes"]) == (3000, 3000 * bytes_per_token)
    assert report["unprofiled_memory"] == {"bytes": None, "why": "on a CPU vLLM has no memory profile"}
    assert prompt["accepted"] == "yes"
    ratio = prompt["attention_work_dense_over_star"]
    saved = f"star: {ratio:.1f} times less attention work at 3,000 tokens"
    assert report["verdict"] == [
        f"{saved}; loss on your model: not measured, run starling advise",
        "by default such a prompt is dense: star is off",
    ]
    assert [*report][:3] == ["verdict", "machine", "installation"]
    assert prompt["by_default"] == "dense"
    assert prompt["plan_with_star_on"] == summary(plan)
    assert prompt["attention_work_dense_over_star"] == round(
        dense_keys(plan.num_prompt_tokens) / keys_attended(plan), 2
    )


def test_without_prefix_caching_no_document_is_found_again(model):
    for caching, says in ((True, "yes, star_segments"), (False, "no: prefix caching is off")):
        config = EngineArgs(model=model, dtype="float32", enable_prefix_caching=caching).create_engine_config()
        assert doctor.documents(config, ()).startswith(says)
        assert doctor.documents(config, ("no op", "no page")) == "no: no op; no page"


@pytest.mark.parametrize(
    ("tokens", "says"), [(4095, "yes"), (4096, "no: max_model_len is 4,096, for prompt and output together")]
)
def test_whether_the_server_accepts_a_prompt_of_that_length(model, tokens, says):
    config = EngineArgs(model=model, dtype="float32").create_engine_config()
    assert (
        doctor.prompt_cost(tokens, StarOptions(), doctor.kv_cache(config), EngineFacts(128), config)["accepted"] == says
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "auto works: the chat template separates messages"),
        (COUNTED, "auto does not work: the chat template does not render the first message as the beginning"),
        ("{{ raise_exception('no chats') }}", "auto does not work: no chats"),
    ],
    ids=["the model's", "not a beginning", "broken"],
)
def test_whether_the_messages_of_chats_can_be_segments(model, template, says):
    """With vLLM's own renderer, and the model's tokenizer."""
    config = EngineArgs(model=model, dtype="float32").create_engine_config()
    assert doctor.messages_as_segments(config, ChatParams(chat_template=template)).startswith(says)


def test_what_an_attamba_models_cache_holds(tmp_path):
    plugin.register()
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "intermediate_size": 96, "ssm_heads": 2}
    sizes |= {"ssm_inner": 32, "ssm_state_dim": 16, "token_chunk": 8, "leading_tokens": 16, "num_hidden_layers": 2}
    model = make_random_attamba(tmp_path / "attamba", max_position_embeddings=4096, **sizes)
    options = ("--dtype", "float32", "--max-num-batched-tokens", "512", "--prompt-tokens", "1000")
    whole = examine(str(model), *options)
    assert whole["attention_backend"]["name"] == "ATTAMBA"
    assert "C++ ops" in whole["attention_op"]["why"]
    report = whole["kv_cache"]
    row = 2 * 64 * 4 * 2  # K|V, values, float32, layers
    assert (report["bytes_per_token"], report["bytes_per_token_uncompressed"]) == (17 * row / 128, row)
    assert whole["prompt"]["decode_step"] is None, "its tokens do not see all keys"
    # 8 pages of states; positions 984 to 999 of the window and 993 to 999 of the inputs, each of one page or two.
    assert (whole["prompt"]["kv_pages"], whole["prompt"]["kv_bytes"]) == (8 + 2 + 1, 11 * 17 * row)
    groups = {name: (group["page_tokens"], group["bytes_per_token"]) for name, group in report["groups"].items()}
    page = 17 * row
    assert groups == {"states": (128, page / 128), "window": (16, page / 16), "rows": (16, page / 16)}
    assert report["groups"]["window"]["held_of_a_request"] == "its last 17 tokens"


def test_what_is_refused_and_why(model):
    report = examine(model, "--prompt-tokens", "3000", "--kv-sharing-fast-prefill")
    assert any("fast prefill" in reason for reason in report["star_refused"])
    (refusal,) = report["options_refused"]
    assert refusal.startswith("star='on' is refused: ") and "fast prefill" in refusal
    assert report["star_block_reuse"] == "no: Star Attention is refused"
    assert report["prompt"]["plan_with_star_on"] is None


def test_a_prompt_of_one_star_block_is_dense_with_star_on_too(model, capfd):
    assert doctor.run([model, "--prompt-tokens", "1000", "--star", "on", "--json"]) == 0
    output = capfd.readouterr().out  # within this process, vLLM's log comes first
    prompt = json.loads(output[output.index("{\n") :])["prompt"]
    assert prompt["by_default"] == prompt["plan_with_star_on"]["attention"] == "dense"
    assert prompt["attention_work_dense_over_star"] == 1.0


def test_replicas(model):
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = ("--dtype", "float32", "--data-parallel-size", "2", "--prompt-tokens", "3000", "--star-block-size", "512")
    report = examine(model, *options, **cores)
    assert report["replicas"] == {
        "number": 2,
        "split": "yes",
        "shards": "yes, with star_shards=on (default off)",
        "timeout": 30.0,
        "cores": "0|1",
    }
    assert report["prompt"]["plan_with_star_on"]["replicas"] == 2
    report = examine(model, *options, "--no-enable-prefix-caching", **cores)
    assert report["replicas"]["split"].startswith("no: replicas exchange pages of their prefix caches")
    assert report["prompt"]["plan_with_star_on"]["replicas"] == 1


def test_the_installation_alone(capfd, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.run(["--json"]) == 0
    installation = json.loads(capfd.readouterr().out)["installation"]
    assert installation["problem"] is None
    assert installation["vllm"] == vllm_version()
    assert installation["compiler"] is None
    assert any("no C++ compiler" in note for note in installation["notes"])


def test_options_that_a_server_would_refuse(model):
    done = run(model, "--star-block-size", "100")
    assert (done.returncode, done.stdout) == (2, "")
    assert "star_block_size=100 is refused" in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("Failed to infer device type"), ImportError("no libcuda.so.1")])
def test_what_vllm_can_not_do_here_is_said_behind_the_installation(model, capfd, monkeypatch, error):
    def examine(*arguments):
        raise error

    monkeypatch.setattr(doctor, "examine", examine)
    assert doctor.run([model]) == 2
    printed = capfd.readouterr()
    assert "vllm supported" in printed.out
    assert printed.err.endswith(f"starling doctor: error: {error}\n")
    assert "memory" in printed.out, "and behind what is known of the machine"
    assert doctor.run([model, "--json"]) == 2
    assert capfd.readouterr().out == ""


def test_tables_show_brackets_as_they_are():
    output = io.StringIO()
    doctor.print_report({"installation": {"a[b]": "[/x] vllm-starling[bench]"}}, output)
    assert "a[b]" in output.getvalue() and "[/x] vllm-starling[bench]" in output.getvalue()


def test_the_help_says_that_the_model_comes_first(capsys):
    with pytest.raises(SystemExit):
        doctor.run(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "before the server's options" in words
    assert "which options it refuses" in words


def test_a_mistake_is_one_line(capfd):
    assert doctor.run(["./nowhere", "--prompt-tokens", "5"]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("starling doctor: error: MODEL='./nowhere' is refused: there is no such folder")
    with pytest.raises(SystemExit) as ended:
        doctor.run(["--prompt-tokns", "5"])
    assert ended.value.code == 2
    assert "--prompt-tokns is refused" in capfd.readouterr().err


def test_a_prompt_that_is_refused_is_exit_code_1(model, capfd):
    assert doctor.run([model, "--prompt-tokens", "131072"]) == 1
    first = capfd.readouterr().out.splitlines()
    assert "131,072 tokens: refused, the model has 4,096 for prompt and output (max_model_len)" in first


def test_tables(model, capfd):
    assert doctor.run([model, "--prompt-tokens", "3000", "--star-block-size", "512"]) == 0
    output = capfd.readouterr().out
    assert output.index(" times less attention work at 3,000 tokens") < output.index("python")
    assert "bytes per token" in output
    assert "star blocks: 5" in output
    words = " ".join(output.replace("│", " ").split())
    assert "options refused" in words and "star_replicas=2 is refused: this server has 1" in words


def test_the_page_of_a_hybrid_model_takes_as_much_memory_as_a_state(tmp_path):
    """vLLM makes a page of 64 tokens of the 32 when it loads this model: a state takes 20,096 bytes."""
    model = make_random_hybrid(tmp_path / "granite", "granite")
    cache = examine(str(model), "--dtype", "float32", "--block-size", "32")["kv_cache"]
    bytes_per_token = 2 * 2 * 2 * 32 * 4  # K and V, full-attention layers, KV heads, head size, float32
    assert cache == {"page_tokens": 64, "page_bytes": 64 * bytes_per_token, "bytes_per_token": bytes_per_token}
