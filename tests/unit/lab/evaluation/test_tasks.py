"""The tasks: the answer is in the text, the same seed gives the same prompt, and lengths fit."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.lab.evaluation.comparison import score
from starling.lab.evaluation.prompts import NEAR, fit, task_prompts
from starling.lab.evaluation.tasks import ASSOCIATIONS, GROUPS, TASKS, choose_tasks
from starling.lab.evaluation.words import prose, pseudo_words

SEEDS = st.integers(0, 2**32)
EACH_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


# Of the texts of five seeds and three sizes, as they were before examples had a depth.
DIGESTS = {
    "niah_single_1": "eb9fff989a53c5e7",
    "niah_single_2": "cb5ceeabb9eaa09c",
    "niah_single_3": "41a361eba3f7a0c7",
    "niah_multikey_1": "145af93934118e6f",
    "niah_multikey_2": "8e0c05fab69cd481",
    "niah_multikey_3": "f5feaba5ff7448ad",
    "niah_multivalue": "8d9e9c4799831bb6",
    "niah_multiquery": "988bcdc83a4d6ea6",
    "vt": "b967ac220a4f5dac",
    "moves": "120c5e9c24690b98",
    "cwe": "f290fc941666818c",
    "fwe": "98a280f9244fa027",
    "nth_note": "74b0fa9522637fe4",
    "association": "aa47b7efb7c4f589",
    "code": "0c1971137c6f2f6a",
}


class Words:
    """A tokenizer: a token for each word and each sign."""

    async def tokenize(self, text: str) -> list[int]:
        return [len(piece) for piece in re.findall(r"\w+|[^\w\s]", text)]

    tokenize_prompt = tokenize

    async def tokenize_chat(self, messages: list) -> list[int]:
        return [0, 0, *await self.tokenize(messages[0]["content"]), 0]


@EACH_TASK
@given(seed=SEEDS, extra=st.integers(0, 40))
def test_the_answer_is_in_the_text_and_scores_fully(task, seed, extra):
    example = task.make(Random(seed), task.least + extra)
    assert all(reference in example.text for reference in example.references)
    assert len(set(example.references)) == len(example.references)
    assert score(example.answer, example.references, "all") == 1
    assert score(example.answer_prefix, example.references, "all") == 0, "the prefix must not give the answer away"


@EACH_TASK
@given(seed=SEEDS)
def test_a_seed_decides_the_example(task, seed):
    size = task.least + 20
    assert task.make(Random(seed), size) == task.make(Random(seed), size)
    assert task.make(Random(seed), size) != task.make(Random(seed + 1), size)


@EACH_TASK
def test_texts_stay_those_of_stored_answers(task):
    """Another text has another key: the answers that users have in their folders would be asked for again."""
    digest = hashlib.sha256()
    for seed in range(5):
        for size in (task.least, task.least + 3, task.least + 20):
            made = task.make(Random(f"{seed}"), size)
            digest.update(json.dumps([made.text, made.answer_prefix, made.references, made.separator]).encode())
    assert digest.hexdigest()[:16] == DIGESTS[task.name]


@pytest.mark.parametrize("task", [task for name, task in TASKS.items() if name not in ("vt", "fwe", "cwe", "nth_note")])
@given(seed=SEEDS)
def test_the_question_alone_does_not_answer(task, seed):
    """The references are in the context only: a model that sees the query alone can't know them."""
    example = task.make(Random(seed), task.least + 20)
    question = example.text.rpartition("\n\n")[2]
    assert not any(reference in question for reference in example.references)


@EACH_TASK
@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_prompts_fit_their_length_and_come_near_it(task, prompt_format):
    settings = {"seed": 0, "prompt_format": prompt_format, "tokenizer": Words()}
    for length in (3000, 8000):
        for prompt in asyncio.run(task_prompts(task, length, 2, **settings)):
            assert NEAR * (length - task.max_tokens) - 100 <= len(prompt.token_ids) <= length - task.max_tokens
            assert (prompt.task, prompt.length) == (task.name, length)
            assert prompt.references and prompt.answer_ids


FACTS = {
    "niah": r"Remember: the passcode of \S+ is {}\.",
    "association": r"By the way, {} [^.]*\.",
    "code": r"def limit_(?:(?!def limit_).)*return {}\n",
    "nth": r"{}",
}


@EACH_TASK
@given(seed=SEEDS, extra=st.integers(0, 40))
def test_the_depth_is_where_the_only_fact_begins(task, seed, extra):
    example = task.make(Random(seed), task.least + extra)
    if task.name in ("niah_multivalue", "niah_multiquery", "vt", "moves", "cwe", "fwe"):
        assert example.depth is None
        return
    fact = FACTS[task.name.partition("_")[0]].format(re.escape(" ".join(example.references)))
    [found] = re.finditer(fact, example.text, re.DOTALL)
    assert round(example.depth * len(example.text)) == found.start()
    assert 0 < example.depth < 1


def test_prompts_have_the_depth_of_their_example():
    settings = {"seed": 0, "prompt_format": "text", "tokenizer": Words()}
    for name in ("niah_single_2", "vt"):
        prompts = asyncio.run(task_prompts(TASKS[name], 2000, 8, **settings))
        depths = {prompt.depth for prompt in prompts}
        assert depths == {None} if name == "vt" else len(depths) == 8 and min(depths) < 0.4 and max(depths) > 0.6


def test_more_prompts_leave_the_first_ones_as_they_are():
    settings = {"seed": 3, "prompt_format": "text"}
    few, many = (asyncio.run(task_prompts(TASKS["vt"], 1000, count, tokenizer=Words(), **settings)) for count in (2, 4))
    assert many[:2] == few
    others = asyncio.run(task_prompts(TASKS["vt"], 1000, 2, tokenizer=Words(), seed=4, prompt_format="text"))
    assert not {prompt.references for prompt in others} & {prompt.references for prompt in few}


def test_a_length_that_is_too_short_is_refused_with_the_shortest_prompt():
    with pytest.raises(ValueError, match=r"lengths=512 is too short for the task cwe: its shortest prompt has \d+ tok"):
        asyncio.run(task_prompts(TASKS["cwe"], 512, 1, seed=0, prompt_format="text", tokenizer=Words()))


@given(tokens=st.integers(1, 30), budget=st.integers(100, 5000), least=st.integers(1, 3), guess=st.integers(1, 9000))
def test_fit_finds_the_largest_size_within_two_percent(tokens, budget, least, guess):
    async def measure(size: int) -> int:
        return 5 + tokens * size

    size, measured = asyncio.run(fit(lambda size: size, measure, budget, least, guess))  # type: ignore[arg-type]
    assert measured == 5 + tokens * size <= budget
    assert measured >= NEAR * budget or measured + tokens > budget


@given(seed=SEEDS)
def test_no_pseudo_word_contains_another(seed):
    words = pseudo_words(Random(seed), 60)
    assert not any(one in other for one in words for other in words if one is not other)


@given(seed=SEEDS)
def test_prose_has_no_digits_and_no_wrong_article(seed):
    text = " ".join(prose(Random(seed), 50))
    assert not re.search(r"\d|\b[Aa] [aeio]|\b[Aa]n [^aeio]|\{", text)


COMMON = {"the", "who", "of", "people", "in", "text", "has", "been", "to", "is", "a", "an", "with", "answer", "name"}


def test_associations_share_no_word_with_their_question():
    assert len(ASSOCIATIONS) >= 40
    for needle, answer, question in ASSOCIATIONS:
        asked = set(re.findall(r"\w+", question.format(answer=answer).lower())) - COMMON
        assert not asked & set(re.findall(r"\w+", needle.lower())), (needle, answer)
    assert len({answer for _, answer, _ in ASSOCIATIONS}) == len(ASSOCIATIONS)


def replay(story: list[tuple[str, str, str]], thing: str) -> str:
    """Where ``thing`` is at the end, from (person, verb, object) in order."""
    places, carrier = {}, ""
    for person, verb, what in story:
        if verb == "went to":
            places[person] = what
        elif what == thing:
            carrier = person
    return places[carrier]


@given(seed=SEEDS)
def test_the_thing_is_where_the_story_leads(seed):
    example = TASKS["moves"].make(Random(seed), 30)
    story = re.findall(r"(\w+) (went to|picked up) the (\w+)\.", example.text)
    [thing] = re.findall(r"Where is the (\w+)", example.text)
    assert (replay(story, thing),) == example.references


@given(seed=SEEDS)
def test_variables_form_one_chain_in_the_order_of_the_text(seed):
    example = TASKS["vt"].make(Random(seed), 30)
    value = re.findall(r"have the value (\d+)", example.text)[0]
    known = set()
    for name, of_name in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example.text):
        assert of_name == value or of_name in known
        known.add(name)
    assert known == set(example.references)


@given(seed=SEEDS, size=st.integers(60, 2000))
def test_the_frequent_words_are_the_most_frequent(seed, size):
    for name in ("fwe", "cwe"):
        example = TASKS[name].make(Random(seed), size)
        counts = Counter(re.findall(r"[a-z]+", example.text.split("\n\n")[1]))
        least = min(counts[reference] for reference in example.references)
        assert all(count < least for word, count in counts.items() if word not in example.references)


@given(seed=SEEDS)
def test_the_note_is_the_nth_one_about_its_topic(seed):
    example = TASKS["nth_note"].make(Random(seed), 12)
    ordinal, topic = re.findall(r"Repeat the (\w+) note about (\w+),", example.text)[0]
    notes = re.findall(rf"^Note about {topic}: (.*)$", example.text, re.MULTILINE)
    assert notes[["first", "second", "third", "fourth"].index(ordinal)] == " ".join(example.references)
    assert all(example.text.count(reference) == 1 for reference in example.references)


@given(seed=SEEDS)
def test_the_function_returns_the_reference(seed):
    """The generated files are Python: run them."""
    example = TASKS["code"].make(Random(seed), 9)
    files = example.text.split("\n\n", 1)[1].rpartition("\n\nWhat does")[0]
    call = re.findall(r"What does `(.*)` return", example.text)[0]
    scope: dict = {}
    exec(files, scope)
    assert (str(eval(call, scope)),) == example.references


def test_ruler_has_eleven_of_its_thirteen_tasks():
    assert len(GROUPS["ruler"]) == 11
    assert [task.name for task in choose_tasks(["niah_multikey", "vt"])] == [
        *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "vt")
    ]
    assert [task.name for task in choose_tasks(["vt", "all"])] == list(TASKS)


@pytest.mark.parametrize("name", ["qa_1", "nia", "", "niah_single_", "VT"])
def test_unknown_tasks_are_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"is refused: there is no such task\. Allowed: all, ruler, niah_single_1"):
        choose_tasks(["vt", name])
