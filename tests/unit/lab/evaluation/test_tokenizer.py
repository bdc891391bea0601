"""`--tokenizer`: prompts for a server without vLLM's /tokenize."""

from __future__ import annotations

import asyncio
import builtins
import json
import signal

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from starling.lab.evaluation import client as client_module
from starling.lab.evaluation.commands import eval as cli
from starling.lab.evaluation.report import Report
from starling.lab.evaluation.tokenizer import LocalTokenizer
from tests.unit.lab.evaluation.fake_server import served

TASKS = ("--tasks", "vt,code", "--lengths", "3000", "--prompts-per-cell", "2")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
OF_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}<answer>"
)
USER = {"role": "user", "content": "a question"}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)


def make_tokenizer(path, template=TEMPLATE, bos: str | None = None):
    """The tokenizer of the fake server, in a folder: a token is the code of a character."""
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(0x2100)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ord(bos))])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, bos_token=bos)
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def evaluate(fake, out, *options: str) -> int:
    return cli.run(["--base-url", fake.url, *options, "--out", str(out)])


def chat(path, *messages) -> str:
    return "".join(map(chr, asyncio.run(LocalTokenizer(path).tokenize_chat(messages))))


@pytest.mark.parametrize("options", [(), ("--prompt-format", "text"), ("--plan", "n/8", "--logprobs", "2")])
def test_the_prompts_are_those_of_the_servers_tokenizer(tmp_path, folder, options):
    with served() as fake:
        assert evaluate(fake, tmp_path / "server", *TASKS, *options) == 0
    with served(tokenizes=False) as other:
        assert evaluate(other, tmp_path / "folder", *TASKS, *options, "--tokenizer", str(folder)) == 0
    sent, again = ([body["prompt"] for body in each.completions[1:]] for each in (fake, other))
    assert sent == again and max(map(len, sent)) > 2800
    report = Report.model_validate_json((tmp_path / "folder" / "results.json").read_text())
    assert f"--tokenizer {folder}" in report.command and report.server["max_model_len"] is None


def test_a_token_before_each_prompt(tmp_path):
    tokenizer = LocalTokenizer(make_tokenizer(tmp_path, "{{ bos_token }}" + TEMPLATE, bos="^"))
    assert asyncio.run(tokenizer.tokenize("ab")) == [ord("a"), ord("b")]
    assert asyncio.run(tokenizer.tokenize_prompt("ab")) == [ord("^"), ord("a"), ord("b")]
    assert chat(tmp_path, USER) == "^<user>a question<answer>"


def test_a_template_that_takes_parts(tmp_path):
    make_tokenizer(tmp_path, OF_PARTS)
    assert chat(tmp_path, {"role": "system", "content": "be brief"}, USER) == "<system>be brief<user>a question<answer>"
    assert chat(tmp_path, USER, {"role": "tool", "content": "5"}) == "<user>a question<tool>5<answer>"


def test_chats_of_the_users_own(tmp_path, folder):
    parts = [{"type": "text", "text": "one"}, "two"]
    assert chat(folder, {"role": "user", "content": parts}) == "<user>one\ntwo<answer>"
    make_tokenizer(
        tmp_path, "{% for m in messages %}<{{ m.content }}>{{ m.tool_calls[0].function.arguments }}{% endfor %}"
    )
    for arguments, text in (('{"a": 5}', "{'a': 5}"), ({"a": 5}, "{'a': 5}"), ("", "{}"), ("{", "{}"), ("5", "{}")):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        assert chat(tmp_path, {"role": "assistant", "content": None, "tool_calls": [call]}) == f"<>{text}"
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts[:1]}]}))
    with served(tokenizes=False) as fake:
        assert evaluate(fake, tmp_path / "out", "--prompts", str(file), "--tokenizer", str(folder)) == 0
    assert "".join(map(chr, fake.completions[1]["prompt"])) == "<user>one<answer>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "--prompt-format text for tasks"),
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("no text", "it leaves out the user's last text"),
    ],
)
def test_a_chat_that_the_template_does_not_take_is_named(tmp_path, capsys, template, reason):
    make_tokenizer(tmp_path, template)
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"messages": [USER]}))
    with served(tokenizes=False) as fake:
        for options in (("--prompts", str(file)), TASKS):
            assert evaluate(fake, tmp_path / "out", *options, "--tokenizer", str(tmp_path)) == 2
            error = capsys.readouterr().err
            assert "the tokenizer's chat template can't make the chat: " in error and reason in error
            assert (": the prompt line 1: " in error) == (options[0] == "--prompts")
            assert ("Without a chat template" in error) == (template is None)


def test_the_length_of_a_model_that_its_name_comes_with_is_kept(tmp_path, folder, capsys):
    models = {"data": [{"id": "fake", "max_model_len": 2000}]}
    with served(tokenizes=False, replies={"/v1/models": models}) as fake:
        assert evaluate(fake, tmp_path, *TASKS, "--tokenizer", str(folder)) == 2
    assert "lengths=3000 is refused: the server's max_model_len is 2000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "refused"),
    [
        (lambda num_tokens: num_tokens + 1, True),
        (lambda num_tokens: min(num_tokens, 2048), True),
        (lambda num_tokens: None, False),
        (lambda num_tokens: 0, False),
    ],
)
def test_a_server_that_changes_prompts_is_refused(tmp_path, folder, capsys, counts, refused):
    with served(tokenizes=False, starling=False, counts=counts) as fake:
        assert evaluate(fake, tmp_path, *TASKS, "--tokenizer", str(folder)) == refused
    error = capsys.readouterr().err
    assert ("the prompt vt/3000/0: " in error and "it cuts prompts, or adds tokens" in error) == refused


def test_a_signal_is_seen_while_prompts_are_made(tmp_path, folder, capsys, monkeypatch):
    tokenize = LocalTokenizer.tokenize

    async def interrupted(self, text: str) -> list[int]:
        signal.raise_signal(signal.SIGTERM)
        return await tokenize(self, text)

    monkeypatch.setattr(LocalTokenizer, "tokenize_prompt", interrupted)
    options = (*TASKS, "--prompt-format", "text", "--tokenizer", str(folder))
    with served(tokenizes=False) as fake:
        assert evaluate(fake, tmp_path, *options) == 130
        assert len(fake.completions) == 1, "the first, which asks what the server is"
    assert "starling eval: interrupted" in capsys.readouterr().err


def test_with_a_model_it_is_an_option_of_the_server(tmp_path, monkeypatch):
    asked = []

    def served_model(model, options, log):
        asked.extend(options)
        raise ValueError("enough")

    monkeypatch.setattr("starling.lab.evaluation.commands.measuring.served", served_model)
    assert cli.run(["some/model", *TASKS, "--tokenizer", "some/tokenizer", "--out", str(tmp_path)]) == 2
    assert asked == ["--tokenizer", "some/tokenizer"]


def test_what_has_no_tokenizer(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"is refused: it is no folder\. Allowed: a folder with the model's"):
        LocalTokenizer(folder / "tokenizer.json")
    refused = r"tokenizer='.*' is refused: (?s:.*)Allowed: a folder with the model's"
    with pytest.raises(ValueError, match=refused):
        LocalTokenizer(tmp_path)
    for name, text in (("tokenizer.json", '{"model": "another version"}'), ("tokenizer_config.json", "[]")):
        make_tokenizer(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=refused):
            LocalTokenizer(tmp_path)
    make_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "code.Own"]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of a folder has run')")
    with pytest.raises(ValueError, match=refused):
        LocalTokenizer(tmp_path)

    def no_transformers(name, *args, real=builtins.__import__, **kwargs):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    with pytest.raises(ValueError, match=r"--tokenizer needs Transformers \(pip install transformers\)"):
        LocalTokenizer(folder)
