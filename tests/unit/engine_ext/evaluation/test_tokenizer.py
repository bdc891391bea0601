"""`--tokenizer`: prompts for a server without vLLM's /tokenize."""

from __future__ import annotations

import asyncio
import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine_ext.evaluation import client as client_module
from engine_ext.evaluation.report import Report
from engine_ext.evaluation.tokenizer import LocalTokenizer
from engine_ext.serving.cli import eval as cli
from tests.unit.engine_ext.evaluation.fake_server import served

TASKS = ("--tasks", "vt,code", "--lengths", "3000", "--prompts-per-cell", "2")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tokenizer of the fake server: a token is the code of a character."""
    codes = {chr(code): code for code in range(0x2100)}
    tokenizer = Tokenizer(models.WordLevel(codes))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(path)
    return path


def evaluate(fake, out, *options: str) -> int:
    return cli.run(["--base-url", fake.url, *options, "--out", str(out)])


@pytest.mark.parametrize("options", [(), ("--prompt-format", "text"), ("--plan", "n/8", "--logprobs", "2")])
def test_the_prompts_are_those_of_the_servers_tokenizer(tmp_path, folder, options):
    with served() as fake:
        assert evaluate(fake, tmp_path / "server", *TASKS, *options) == 0
    with served(tokenizes=False) as other:
        assert evaluate(other, tmp_path / "folder", *TASKS, *options, "--tokenizer", str(folder)) == 0
    sent, again = ([body["prompt"] for body in each.completions[1:]] for each in (fake, other))
    assert sent == again and max(map(len, sent)) > 2800
    assert fake.num_tokenized and not other.num_tokenized
    report = Report.model_validate_json((tmp_path / "folder" / "results.json").read_text())
    assert f"--tokenizer {folder}" in report.command and report.server["max_model_len"] is None


def test_own_chats_whose_text_has_parts(tmp_path, folder):
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    with served(tokenizes=False) as fake:
        assert evaluate(fake, tmp_path / "out", "--prompts", str(file), "--tokenizer", str(folder)) == 0
    assert "".join(map(chr, fake.completions[1]["prompt"])) == "<user>one\ntwo<answer>"


def test_the_length_of_a_model_that_its_name_comes_with_is_kept(tmp_path, folder, capsys):
    models = {"data": [{"id": "fake", "max_model_len": 2000}]}
    with served(tokenizes=False, replies={"/v1/models": models}) as fake:
        assert evaluate(fake, tmp_path, *TASKS, "--tokenizer", str(folder)) == 2
    assert "lengths=3000 is refused: the server's max_model_len is 2000" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [lambda num_tokens: num_tokens + 1, lambda num_tokens: min(num_tokens, 2048)])
def test_a_server_that_changes_prompts_is_refused(tmp_path, folder, capsys, counts):
    with served(tokenizes=False, starling=False, counts=counts) as fake:
        assert evaluate(fake, tmp_path, *TASKS, "--tokenizer", str(folder)) == 1
    error = capsys.readouterr().err
    assert "the prompt vt/3000/0: " in error and "it cuts prompts, or adds tokens" in error


def test_what_has_no_tokenizer_or_no_template(tmp_path, folder):
    with pytest.raises(ValueError, match=r"is refused: it is no folder\. Allowed: a folder with the model's"):
        LocalTokenizer(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer='.*' is refused: (?s:.*)Allowed: a folder with the model's"):
        LocalTokenizer(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"can't make the chat: (?s:.*)--prompt-format text for tasks"):
        asyncio.run(LocalTokenizer(tmp_path).tokenize_chat([{"role": "user", "content": "a"}]))


def test_a_chat_that_the_template_refuses_is_named(tmp_path, folder, capsys):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "tool", "content": "a"}]}))
    with served(tokenizes=False) as fake:
        assert evaluate(fake, tmp_path / "out", "--prompts", str(file), "--tokenizer", str(tmp_path)) == 2
    assert "the prompt line 1: the tokenizer's chat template can't make the chat: no tool" in capsys.readouterr().err
