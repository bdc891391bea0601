"""Plans, options and files of prompts: what is accepted, and what is refused with which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from starling.lab.evaluation.commands.eval import make_parser
from starling.lab.evaluation.prompt_options import (
    DENSE,
    LETTERS,
    EvalOptions,
    Plan,
    parse_options,
    parse_plan,
    with_dense,
    without_secrets,
)
from starling.lab.evaluation.prompts import read_own_prompts
from starling.lab.evaluation.store import Answer, Store, locked
from starling.lab.evaluation.tasks import GROUPS, TASKS


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("dense", {"star": "off"}),
        ("default", {"star": "on"}),
        ("n/8", {"star": "on", "star_block_size": "n/8"}),
        ("B=n/8,Q=64", {"star": "on", "star_block_size": "n/8", "star_query_tokens": 64}),
        (
            "B=1024,A=512,O=0",
            {"star": "on", "star_block_size": 1024, "star_anchor_size": 512, "star_overlap_size": 0},
        ),
    ],
)
def test_plans(text, options):
    assert parse_plan(text) == Plan(text, options)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is no option of a plan"),
        ("n/", "star_block_size='n/' is refused"),
        ("n/-8", "star_block_size='n/-8' is refused"),
        ("B=1q", "star_block_size='1q' is refused"),
        ("B=٣", "star_block_size='٣' is refused"),
        ("B=1,B=2", "B is given twice"),
        ("C=1", "'C=1' is no option of a plan"),
        ("default,B=1", "'default' is no option of a plan"),
        ("n/8,B=1024", "B is given twice"),
        ("B=0", "star_block_size=0 is refused"),
    ],
)
def test_refused_plans(text, reason):
    with pytest.raises(ValueError) as refused:
        parse_plan(text)
    assert reason in str(refused.value) and f"plan={text!r}" in str(refused.value)
    assert "Allowed: " in str(refused.value)


def test_dense_comes_first_and_each_plan_once():
    star = parse_plan("n/8")
    assert with_dense([star]) == with_dense([star, DENSE]) == [DENSE, star]
    with pytest.raises(ValueError, match="plan='n/8' is refused: it is given twice"):
        with_dense([star, star])
    for one, other in (("n/8", "B=n/8"), ("O=0,n/8", "n/8,O=0")):
        with pytest.raises(ValueError, match=f"plan='{other}' is refused: it is the same plan as {one}"):
            with_dense([parse_plan(one), parse_plan(other)])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "either --tasks or --prompts is needed"),
        ({"tasks": ("vt",), "prompts": Path("x")}, "and not both"),
        ({"tasks": ("vt",), "lengths": ("many",)}, "lengths='many' is refused: Input should be a valid integer"),
        ({"tasks": ("vt",), "lengths": ("16",)}, "greater than or equal to 256"),
        ({"tasks": ("vt",), "lengths": ("512", "1024", "512")}, "lengths='512,1024,512' is refused: a length is given"),
        ({"tasks": ("vt",), "prompts_per_cell": 0}, "prompts_per_cell=0 is refused"),
        ({"tasks": ("vt",), "logprobs": -1}, "logprobs=-1 is refused"),
        ({"tasks": ("vt",), "plans": ("n/x",)}, "plan='n/x': star_block_size='n/x' is refused"),
        ({"tasks": ("vvt",)}, "tasks='vvt' is refused"),
        ({"prompts": Path("/none/such.jsonl")}, "prompts='/none/such.jsonl' can't be read"),
    ],
)
def test_refused_options(values, reason):
    with pytest.raises(ValueError) as refused:
        parse_options(EvalOptions, values)
    assert reason in str(refused.value)


def test_the_command_of_a_report_repeats_the_options_without_secrets():
    options = parse_options(
        EvalOptions, {"tasks": ("vt", "niah"), "lengths": ("512", 1024), "plans": ("n/8", "B=64,A=64")}
    )
    command = options.command(["some/model", "--hf-token", "abc", "--api-key=def", "--dtype", "float32"])
    assert command.startswith("starling eval some/model --hf-token ... --api-key=... --dtype float32 --plan n/8 ")
    assert "--plan B=64,A=64 --tasks vt,niah --lengths 512,1024" in command
    assert without_secrets(["--trust-remote-code", "--hf-token", "--other", "x"])[-2:] == ["--other", "x"]
    assert without_secrets(["--hf_token", "x"]) == ["--hf_token", "..."]
    several = ["model", "--api_key", "one", "two", "--dtype", "float32"]
    assert without_secrets(several) == ["model", "--api_key", "...", "...", "--dtype", "float32"]
    shown = ["--max-num-batched-tokens", "2048", "--max_num_batched_tokens=2048"]
    assert without_secrets(shown) == shown


def test_a_file_that_is_one_json_array_is_refused_as_such(tmp_path):
    file = tmp_path / "docs.json"
    file.write_text('[\n {"prompt": "a"},\n {"prompt": "b"}\n]\n')
    with pytest.raises(ValueError) as refused:
        read_own_prompts(file)
    assert str(refused.value).endswith(
        "docs.json' is refused: it is one JSON array. Allowed: JSONL, with one object in each line: "
        '{"prompt": "..."} or {"messages": [...]}, and "answer"'
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is not JSON"),
        ("[]", "it is no object. Allowed: JSONL, with one object in each line"),
        ("{}", "either prompt or messages"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "either prompt or messages"),
        ('{"prompt": ""}', "prompt: "),
        ('{"prompt": 5}', "prompt: "),
        ('{"prompt": "a", "answer": " "}', "answer is empty"),
        ('{"prompt": "a", "answer": []}', "answer is empty"),
        ('{"prompt": "a", "anwser": "b"}', "anwser: "),
        ('{"prompt": "a", "match": "some"}', "match: "),
        ('{"prompt": "a", "id": 7}', "id: Extra inputs are not permitted. Allowed: prompt, messages, answer, match"),
        ('{"messages": [], "tools": []}', "messages: "),
        (f'{{"prompt": {"9" * 5000}}}', "it is not JSON that can be read: Exceeds the limit"),
        ("[" * 100_000, "it is not JSON that can be read: maximum recursion depth"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            "a part of the type 'image_url' is refused",
        ),
    ],
)
def test_refused_lines_name_the_line(tmp_path, line, reason):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(ValueError) as refused:
        read_own_prompts(file)
    assert "line 3: " in str(refused.value) and reason in str(refused.value)


def test_lines_of_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "b"}]
    lines = [{"prompt": "a"}, {"messages": chat, "answer": ["x", "y"], "match": "any"}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    [(first, text), (second, messages)] = read_own_prompts(file)
    assert (first, text.prompt, text.references) == (1, "a", ())
    assert (second, messages.messages, messages.references, messages.match) == (3, chat, ("x", "y"), "any")
    file.write_text("\n")
    with pytest.raises(ValueError, match="the file has no prompt"):
        read_own_prompts(file)


def test_lines_end_at_line_feeds_alone_and_a_mark_at_the_start_is_none(tmp_path):
    file = tmp_path / "prompts.jsonl"
    texts = ["a\u2028b", "a\u0085b\u2029", "a\x0bb\x0c"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [prompt.prompt for _, prompt in read_own_prompts(file)] == texts


def test_parts_of_texts_are_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    [(_, prompt)] = read_own_prompts(file)
    assert prompt.messages[0]["content"] == parts


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is not a regular file, and it is read several times"):
        read_own_prompts(tmp_path / "pipe")


ANSWER = Answer(key="k", prompt="p", plan="dense", text="é\n", finish_reason=None, token_ids=None, server_plan=None)


def test_a_store_has_what_was_added_and_drops_a_line_that_was_cut(tmp_path):
    with Store(tmp_path, {"a": 1}) as store:
        store.add(ANSWER)
    whole = (tmp_path / "results.jsonl").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "results.jsonl").write_bytes(whole + whole[:cut])
        with Store(tmp_path, {"a": 1}) as store:
            assert store.answers == {"k": ANSWER}
            other = ANSWER.model_copy(update={"key": "l"})
            store.add(other)
        with Store(tmp_path, {"a": 1}) as store:
            assert store.answers == {"k": ANSWER, "l": other}


def test_a_store_refuses_another_setup_a_damaged_line_and_a_second_process(tmp_path):
    with locked(tmp_path), Store(tmp_path, {"a": 1, "b": 2}) as store:
        store.add(ANSWER)
        with pytest.raises(ValueError, match="another process uses it"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
    with pytest.raises(ValueError, match=r"results of another setup \(b was 2 and is 3; c was None and is 4\)"):
        Store(tmp_path, {"a": 1, "b": 3, "c": 4})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Store(tmp_path, {"a": 1, "b": 2})


@pytest.mark.parametrize("command", ["eval", "advise"])
def test_the_kit_loads_neither_vllm_nor_torch(command):
    modules = "{'vllm', 'torch', 'matplotlib'} & sys.modules.keys()"
    code = f"import sys, starling.lab.evaluation.commands.{command} as _; print({modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_page_names_every_option_task_and_plan():
    page = (Path(__file__).parents[4] / "docs" / "eval.md").read_text(encoding="utf-8")
    options = [name for action in make_parser()._actions for name in action.option_strings if name.startswith("--")]
    names = [*options, *TASKS, *GROUPS, *LETTERS.values()]
    assert [name for name in names if f"`{name}`" not in page and name != "--help"] == []
