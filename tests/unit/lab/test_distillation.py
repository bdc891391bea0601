"""`starling distil`: what it refuses, its prompts, and that a training learns, can be taken up, and keeps the best."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from benchmarks.random_llama import make_tiny_llama
from starling.lab.distillation import distil
from starling.lab.distillation.adapted_model import AdaptedModel, ModelError, make_rows
from starling.lab.distillation.distil_options import DistilOptions, needed_bytes
from starling.lab.distillation.training import PATIENCE, HeldOut, Training, document_plan, losses, star_plan
from starling.lab.distillation.training_prompts import (
    FUNCTIONS,
    OWN,
    TEXT,
    TaskPrompts,
    chat_segments,
    documented_functions,
    python_texts,
    read_prompts,
    recalls,
    with_answers,
)
from starling.lab.evaluation.document_prompts import SHAPES, Asked, DocumentPrompt, Encoder, Style
from starling.lab.evaluation.tasks import TASKS
from tests.adapters import make_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(folder))


def adapted(folder: Path, recompute: bool = False) -> AdaptedModel:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return AdaptedModel(folder, "cpu", torch.float32, config, recompute)


def prompt_of(seed: int, questions: int = 3) -> DocumentPrompt:
    rng = Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(250) for _ in range(count))

    asked = tuple(Asked(tokens(10), tokens(6)) for _ in range(questions))
    return DocumentPrompt("test", tokens(32), tuple(tokens(40) for _ in range(4)), asked)


def training_of(folder: Path, steps: int, held_out: int = 2) -> Training:
    def case(number: int):
        prompt = prompt_of(number % 4)
        return prompt, document_plan(prompt)

    held = HeldOut("tasks", [case(number) for number in range(held_out)])
    return Training(adapted(folder), case, [held], ["tasks"], steps, 2, 3e-3)


def test_a_new_adapter_changes_nothing_and_a_training_leaves_less_of_the_loss(folder):
    training = training_of(folder, 40)
    first = training.measure()["loss"]["tasks"]
    prompt, plan = training.make(5)
    fresh = [losses(training.model, prompt, plan, adapter=adapter).total for adapter in (False, True)]
    assert float((fresh[0] - fresh[1]).abs()) < 1e-6
    for _ in range(40):
        training.make_step()
    assert training.measure()["loss"]["tasks"] < 0.9 * first


def test_dense_attention_has_no_loss_and_layers_computed_again_the_same_one(folder):
    prompt = prompt_of(1)
    assert float(losses(adapted(folder), prompt, None, adapter=False).total) < 1e-6
    found = []
    for recompute in (False, True):
        model = adapted(folder, recompute)
        loss = losses(model, prompt, document_plan(prompt), adapter=True).total
        loss.backward()
        found.append((float(loss), [parameter.grad.clone() for parameter in model.parameters]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_a_training_that_is_taken_up_ends_with_the_same_adapter(folder, tmp_path):
    whole, parts = training_of(folder, 6), training_of(folder, 6)
    for training in (whole, parts):
        training.measure()
        for _ in range(3):
            training.make_step()
        training.measure()
    parts.store(tmp_path / "state", {"model": "tiny"})
    again = training_of(folder, 6)
    again.restore(tmp_path / "state", {"model": "tiny"})
    assert (again.step, again.curve) == (3, parts.curve)
    for training in (whole, again):
        for _ in range(3):
            training.make_step()
    pairs = zip(whole.model.parameters, again.model.parameters, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="of another model or of other options"):
        training_of(folder, 6).restore(tmp_path / "state", {"model": "other"})
    (tmp_path / "state").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="of another model or of other options"):
        training_of(folder, 6).restore(tmp_path / "state", {"model": "tiny"})


def test_it_ends_early_and_keeps_the_best(folder):
    training = training_of(folder, 100)
    values = iter([1.0, 0.6, 0.5, *[0.5] * PATIENCE])
    training.held_out = [type("Fixed", (), {"name": "tasks", "loss": lambda self, model, adapter: next(values)})()]
    for place in range(3 + PATIENCE):
        assert not training.falls_no_more
        training.average[0].fill_(place)
        training.measure()
    assert training.falls_no_more
    training.use_best()
    assert float(training.model.parameters[0].detach().flatten()[0]) >= 2


def test_a_loss_that_is_no_number_is_said(folder):
    training = training_of(folder, 10)
    with torch.no_grad():
        training.model.parameters[0].fill_(float("nan"))
    with pytest.raises(ModelError, match=r"the loss of step 1 is nan: try a lower --learning-rate"):
        training.make_step()


def test_star_plans_have_blocks_with_an_overlap_or_whole_anchors():
    plans = [star_plan(prompt_of(number), Random(number)) for number in range(20)]
    assert {plan.documents for plan in plans} == {()}
    assert {bool(plan.overlap_size) for plan in plans} == {True, False}


@pytest.mark.parametrize("kind", ["code", "niah_multikey_2", "vt", TEXT, FUNCTIONS])
def test_prompts_depend_on_their_number_alone_and_ask_for_passages(encoder, kind):
    prompts = TaskPrompts(encoder, ("code",), (3000, 4000), 4, "seed")
    one, again, other = (prompts.make(number, kind) for number in (1, 1, 2))
    assert one == again != other
    assert len(one.asked) == 4
    assert 2000 < len(one.context) < 5000 and len(one.documents) > 1
    assert document_plan(one).context_end == len(one.context)


def test_a_prompt_of_more_tokens_than_all_functions_have_has_them_all(encoder):
    prompt = TaskPrompts(encoder, ("code",), (10**7, 10**7), 4, "seed").make(1, FUNCTIONS)
    text = encoder.tokenizer.decode(prompt.context)
    assert all(documentation in text for *_, documentation in documented_functions())


@pytest.mark.parametrize(
    "task", [task for task in TASKS.values() if task.name.startswith(("code", "niah_multikey", "vt"))]
)
def test_another_question_is_about_the_same_text(task):
    first, second = task.make(Random(1), 20), task.make(Random(1), 20, Random(2))
    assert first.text != second.text
    assert first.text.rpartition("\n\n")[0] == second.text.rpartition("\n\n")[0]
    assert first == task.make(Random(1), 20, Random(1)) or first.references != second.references


@pytest.mark.parametrize("shape", SHAPES)
def test_passages_are_in_the_documents(encoder, shape):
    layout = encoder.layout(Style(shape=shape))
    texts = python_texts()[:3]
    documents = [encoder.encode(f"{layout.start}{text}{layout.end}") for text in texts]
    found = recalls(documents, encoder, layout, Random(0), 40)
    assert len(found) == 40
    for asked in found:
        question = encoder.tokenizer.decode(asked.question)
        assert question.startswith(layout.ask) and layout.answer in question
        parts = encoder.tokenizer.decode(asked.answer).split("; ")  # of a question for two passages, or a text's own
        assert all(any(part.strip() in text for text in texts) for part in parts), parts


def test_a_chat_has_its_messages_as_a_server_has_them(encoder):
    messages = [{"role": "user", "content": text} for text in ("Read.", "one", "two", "What?")]
    ids, starts = chat_segments(messages, encoder)
    texts = [encoder.tokenizer.decode(ids[start:stop]) for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    assert texts == ["user: one\n", "user: two\n", "user: What?\nassistant:"]


@pytest.mark.parametrize(("end", "answer"), [("", " yes"), ("\n", "yes"), (" ", "yes")])
def test_the_answer_of_an_own_text_is_a_word_behind_it(encoder, tmp_path, end, answer):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"prompt": f"head|one|two|question{end}", "answer": "yes"}) + "\n")
    (prompt,) = read_prompts(mine, "|", encoder, 8, 1)
    assert prompt.answer == encoder.encode(answer) and len(prompt.documents) == 2


def test_lines_of_the_same_documents_are_questions_of_one_prompt(encoder, tmp_path):
    lines = [f"head|one|{second}|question {number}" for second in ("two", "three") for number in range(5)]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"prompt": text, "answer": text[-1]}) + "\n" for text in reversed(lines)))
    found = read_prompts(mine, "|", encoder, 8, 3)
    assert sorted(len(prompt.asked) for prompt in found) == [2, 2, 3, 3]
    decode = encoder.tokenizer.decode
    texts = [decode([*prompt.context, *asked.question]) for prompt in found for asked in prompt.asked]
    assert sorted(texts) == sorted(lines)
    assert all(decode(asked.answer).strip() == decode(asked.question)[-1] for p in found for asked in p.asked)


@pytest.mark.parametrize("recompute", [False, True])
def test_answers_are_those_of_dense_attention_to_each_question_alone(folder, recompute):
    """Some questions are of one token, and some answers end before the others."""
    model, prompt = adapted(folder, recompute), prompt_of(3)
    questions = [*(asked.question for asked in prompt.asked), prompt.question[:1]]

    def greedy(question: list[int], tokens: int) -> list[int]:
        ids = [*prompt.context, *question]
        for _ in range(tokens):
            rows = make_rows(ids[:-1], [ids[-1:]], None)
            ids.append(int(model.log_probs(rows, adapter=False)[-1].argmax()))
        return ids[-tokens:]

    expected = [greedy([*question], 6) for question in questions]
    assert model.answers(prompt.context, questions, 6, None) == [tuple(answer) for answer in expected]
    end = next(token for answer in expected for token in answer[1:4])
    cut = [tuple(answer[: answer.index(end) + 1] if end in answer else answer) for answer in expected]
    assert model.answers(prompt.context, questions, 6, end) == cut != expected


def test_lines_without_answers_get_the_models_own(folder, encoder, tmp_path):
    mine = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"head|one|two|question {number}"} for number in range(3)]
    lines[1]["answer"] = "yes"
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (prompt,) = read_prompts(mine, "|", encoder, 5, 8)
    model = adapted(folder)
    done = with_answers(prompt, model, 5, None)
    assert [len(asked.answer) for asked in prompt.asked] == [0, len(encoder.encode(" yes")), 0]
    first, _, last = model.answers(prompt.context, [asked.question for asked in prompt.asked], 5, None)
    assert [asked.answer for asked in done.asked] == [first, encoder.encode(" yes"), last]
    assert with_answers(done, None, 5, None) is done


def test_own_prompts_and_tasks_take_turns(encoder, tmp_path):
    mine = tmp_path / "mine.jsonl"
    texts = [f"{'Read. ' * 20}|{number} {'one ' * 20}|{'two ' * 20}|What?" for number in range(4)]
    mine.write_text("".join(json.dumps({"prompt": text, "answer": "one"}) + "\n" for text in texts))
    options = DistilOptions(tasks=("vt",), prompts=mine, segments="|", tokens=4096, held_out=1)
    make, held_out = distil.all_cases(options, encoder, None)
    assert [make(number)[0].task == OWN for number in range(6)] == [False, True] * 3
    assert [held.name for held in held_out] == ["tasks", "text", "other tasks", "own"]
    assert options.setup().keys() >= {"tasks", "prompts_sha256"}
    make, held_out = distil.all_cases(DistilOptions(prompts=mine, segments="|"), encoder, None)
    assert {make(number)[0].task for number in range(6)} == {OWN} and [held.name for held in held_out] == [OWN]


def test_memory_grows_with_prompts_and_falls_with_layers_computed_again(folder):
    def needed(recompute: bool = False, **options) -> int:
        return needed_bytes(folder, DistilOptions(dtype="float32", **options), recompute=recompute)

    assert needed(tokens=4096) > needed(tokens=1024) > needed(recompute=True, tokens=1024)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "{mine}"], "line 1 is a text, which needs --segments TEXT"),
        (["--prompts", "{mine}", "--segments", "two tokens"], "it is not one token of the model's tokenizer"),
        (["--prompts", "{mine}", "--segments", "#"], "line 1 is refused: it has no documents before its question"),
        (
            ["--prompts", "{one}", "--segments", "|"],
            "it has questions about the same documents alone. Allowed: two prompts or more",
        ),
        (["--segments", "|"], "it is for your own prompts"),
        (["--for", "retrieval"], "'documents' or 'star'"),
        (["--for", "star,star"], "a purpose is given twice"),
        (["--tasks", "nothing"], "there is no such task"),
        (["--rank", "0"], "rank=0 is refused"),
        (["--modules", "no_such_proj"], "gets no adapter"),
        (
            ["--start", "nowhere"],
            "start='nowhere' is refused: it is no folder. Allowed: a folder that",
        ),
        (["--start", "nowhere", "--rank", "4"], "rank=4 is refused: --start has its own"),
        (["--start", "{other}"], "it is an adapter of another, with other weights"),
        (["--tokens", "300"], "is too short"),
    ],
)
def test_what_can_not_be_used_is_refused(folder, tmp_path, capsys, arguments, words):
    line = json.dumps({"prompt": "Read.|one|two|What?", "answer": "one"})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n{line.replace('two', 'three')}")
    (tmp_path / "one.jsonl").write_text(line)
    make_adapter(tmp_path / "other", folder, **{"model": "another", "checkpoint": "0"})
    files = {"mine": tmp_path / "mine.jsonl", "one": tmp_path / "one.jsonl", "other": tmp_path / "other"}
    given = [each.format(**files) for each in arguments]
    assert distil.run([str(folder), "--out", str(tmp_path / "adapter"), *given]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "adapter" / "distil.json").exists()


def test_a_model_whose_keys_are_not_turned_is_refused(folder, monkeypatch):
    model = adapted(folder)
    model.check_rotation()
    same = torch.ones(1, 3, 32), torch.zeros(1, 3, 32)
    monkeypatch.setattr(model.decoder.rotary_emb, "forward", lambda key, positions: same)
    with pytest.raises(ModelError, match=r"one rotary embedding with fixed frequencies$"):
        model.check_rotation()
    monkeypatch.setattr(model.decoder.rotary_emb, "forward", lambda key, positions, layer_type: same)
    with pytest.raises(ModelError, match=r"one rotary embedding with fixed frequencies: "):
        model.check_rotation()


def test_a_model_that_is_none(tmp_path, capsys):
    assert distil.run(["models/no_such", "--out", str(tmp_path / "adapter")]) == 2
    assert "MODEL='models/no_such' is refused" in capsys.readouterr().err
