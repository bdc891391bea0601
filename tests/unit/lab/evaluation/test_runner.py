"""The client and the runner against a server in this process."""

from __future__ import annotations

import asyncio

import pytest

from starling.lab.evaluation import client as client_module
from starling.lab.evaluation.answers import ServerError
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.prompt_options import DENSE, parse_plan
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.runner import Memory, check_same_plan, evaluate
from tests.unit.lab.evaluation.fake_server import END, served

STAR = parse_plan("n/8")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)


def prompt(text: str, answer: str = "") -> Prompt:
    references = (answer,) if answer else ()
    ids = tuple(map(ord, text))
    return Prompt(text, "own", None, ids, text, references, "all", tuple(map(ord, answer)), 8)


def run(fake, prompts, plans=(STAR,), store=None, **options):
    async def evaluated():
        async with Client(fake.url, options.pop("model", None), options.pop("api_key", None)) as client:
            return await evaluate(prompts, plans, client, store=store, **options)

    return asyncio.run(evaluated())


def test_each_prompt_is_answered_under_each_plan_dense_first():
    with served(answer=lambda prompt, xargs: f"{prompt[0]}{xargs['star']}") as fake:
        answers = run(fake, [prompt("a" * 100), prompt("b" * 100)])
        assert [(answer.prompt[0], answer.plan, answer.text) for answer in answers] == [
            *(("a", "dense", "aoff"), ("a", "n/8", "aon"), ("b", "dense", "boff"), ("b", "n/8", "bon"))
        ]
        sent = fake.completions[1:]  # behind the one that asks whether Starling is there
        assert [body["vllm_xargs"] for body in sent] == [DENSE.options, STAR.options] * 2
        assert all((body["temperature"], body["max_tokens"]) == (0, 8) for body in sent)
        assert answers[1].server_plan["attention"] == "star"


@pytest.mark.parametrize("answer", ["", "xyz"])
def test_log_probabilities_follow_the_reference_or_else_dense(answer):
    """With the numbers of the plan that the answer had: the prompt grows, and its star blocks stay."""
    with served(answer=lambda prompt, xargs: "dense" if xargs["star"] == "off" else "star") as fake:
        dense, star = run(fake, [prompt("a" * 100, answer)], num_logprobs=2)
        followed = (answer or "dense")[:2]
        forced = [body for body in fake.completions if "allowed_token_ids" in body]
        assert "".join(chr(body["allowed_token_ids"][0]) for body in forced) == followed * 2
        assert [len(body["prompt"]) for body in forced] == [100, 101, 100, 101]
        assert forced[0]["vllm_xargs"] == {"star": "off"}
        exact = {"star_block_size": 13, "star_anchor_size": 1, "star_overlap_size": 12, "star_dense_heads": 0.0}
        expected = [{"star": "on", "star_query_tokens": tokens} | exact for tokens in (50, 51)]
        assert [body["vllm_xargs"] for body in forced[2:]] == expected
        assert [score.logprob for score in dense.scores] == [-0.7, -0.7]
        assert [score.logprob for score in star.scores] == [-1.2, -1.2]
        assert star.scores[0].top == {ord(followed[0]): -1.2, 1: -0.7, 2: -5.0}


def test_log_probabilities_are_those_of_the_dense_heads_of_the_answer():
    """A share of 0.08 is 4 of 48 heads, and the requests behind it ask for just that."""
    with served(answer=lambda prompt, xargs: "xy", kv_heads=48) as fake:
        run(fake, [prompt("a" * 100)], plans=(parse_plan("n/8,H=0.08"),), num_logprobs=2)
        forced = [body["vllm_xargs"] for body in fake.completions if "allowed_token_ids" in body]
        assert [xargs.get("star_dense_heads") for xargs in forced] == [None, None, 0.0833, 0.0833]


def test_log_probabilities_are_with_the_adapter_of_the_answer_or_without():
    with served(answer=lambda prompt, xargs: "xy") as fake:
        run(fake, [prompt("a" * 100)], plans=(parse_plan("n/8,L=off"), parse_plan("n/8")), num_logprobs=2)
        forced = [body["vllm_xargs"] for body in fake.completions if "allowed_token_ids" in body]
        assert [xargs.get("star_adapter") for xargs in forced if xargs["star"] == "on"] == ["off", "off", None, None]


@pytest.mark.parametrize("field", ["adapter", "context_end", "dense_heads"])
def test_log_probabilities_of_another_plan_are_refused(field):
    with pytest.raises(ServerError, match=f"the server changed {field} for a longer prompt"):
        check_same_plan(STAR, {field: 1}, {field: 0})


def test_log_probabilities_after_restrictions_are_refused():
    with served(raw_logprobs=False) as fake, pytest.raises(ServerError, match="--logprobs-mode raw_logprobs"):
        run(fake, [prompt("a" * 100)], plans=(), num_logprobs=1)


def test_the_end_of_an_output_is_followed_too():
    with served(answer=lambda prompt, xargs: "x") as fake:
        [dense] = run(fake, [prompt("a" * 100)], plans=(), num_logprobs=9)
        assert dense.token_ids == [ord("x"), END]
        assert len(dense.scores) == 2


def test_a_plan_that_does_not_engage_ends_the_run():
    with served(engages=False) as fake, pytest.raises(ServerError) as failed:
        run(fake, [prompt("a" * 100)])
    assert "plan='n/8' did not engage on a prompt of 100 tokens: the server reports dense" in str(failed.value)


def test_a_dense_request_that_is_not_dense_ends_the_run(monkeypatch):
    star = {"attention": "star", "overlap_size": 0, "block_size": 1, "anchor_size": 1, "context_end": 9}
    with served() as fake, pytest.raises(ServerError, match="plan='dense' did not engage"):
        monkeypatch.setattr(fake, "plan", lambda num_tokens, xargs: star)
        run(fake, [prompt("a" * 100)], plans=())


def test_a_server_without_starling_can_only_be_dense():
    with served(starling=False) as fake:
        [dense] = run(fake, [prompt("a" * 100)], plans=())
        assert dense.server_plan is None
        assert not any("vllm_xargs" in body for body in fake.completions)
        with pytest.raises(ServerError, match="plan='n/8' is refused: Starling is not activated"):
            run(fake, [prompt("a" * 100)])


def test_what_is_stored_is_not_asked_again():
    store = Memory()
    prompts = [prompt("a" * 100), prompt("b" * 100)]
    with served() as fake:
        first = run(fake, prompts[:1], store=store)
        asked = len(fake.completions)
        new = []
        again = run(fake, prompts, store=store, on_answer=new.append)
        assert again[:2] == first
        assert len(new) == 2 and len(fake.completions) == asked + 1 + 2
        run(fake, prompts, store=store, num_logprobs=1, on_answer=new.append)
        assert len(new) == 6, "answers without log-probabilities are no answers with them"


def test_equal_prompts_share_an_answer_under_both_names():
    twins = [prompt("a" * 100), prompt("a" * 100)]
    twins[1] = Prompt(**vars(twins[1]) | {"name": "twin"})
    with served() as fake:
        answers = run(fake, twins, plans=())
        assert [answer.prompt for answer in answers] == ["a" * 100, "twin"]
        assert len(fake.completions) == 1 + 1


def test_equal_plans_share_an_answer_under_the_name_that_is_asked_for():
    store, [twin] = Memory(), [parse_plan("B=n/8")]
    with served() as fake:
        run(fake, [prompt("a" * 100)], store=store)
        asked = len(fake.completions)
        assert [answer.plan for answer in run(fake, [prompt("a" * 100)], plans=[twin], store=store)] == [
            "dense",
            "B=n/8",
        ]
        assert len(fake.completions) == asked + 1


def test_a_failing_server_is_asked_again():
    failures = iter([None, (500, "out of memory"), (503, "busy")])
    with served(fail=lambda body: next(failures, None)) as fake:
        assert len(run(fake, [prompt("a" * 100)])) == 2


def test_a_server_that_keeps_failing_ends_the_run():
    failures = iter([None])
    with (
        served(fail=lambda body: next(failures, (500, "out of memory"))) as fake,
        pytest.raises(ServerError, match="failed 4 times, the last time with HTTP 500: out of memory"),
    ):
        run(fake, [prompt("a" * 100)])


def test_a_server_that_is_gone_ends_the_run():
    with served() as fake:
        pass
    with pytest.raises(ServerError, match="failed 4 times, the last time with ConnectError"):
        run(fake, [prompt("a" * 100)])


def test_a_refused_request_ends_the_run_with_the_servers_message_at_once():
    def fail(body: dict) -> tuple[int, str] | None:
        return (400, "star_block_size=13 is refused") if body.get("vllm_xargs", {}).get("star") == "on" else None

    store = Memory()
    with (
        served(fail=fail) as fake,
        pytest.raises(ServerError, match="refused the request: HTTP 400: star_block_size=13 is refused"),
    ):
        run(fake, [prompt("a" * 100)], store=store)
    assert [answer.plan for answer in store.answers.values()] == ["dense"], "what was answered before is kept"


def test_prompts_run_at_the_same_time_up_to_the_concurrency():
    running, most = [], []

    def answer(prompt: str, xargs: dict) -> str:
        return prompt[0]

    class Counting(Client):
        async def complete(self, *arguments):
            running.append(1)
            most.append(len(running))
            await asyncio.sleep(0)
            done = await super().complete(*arguments)
            running.pop()
            return done

    async def evaluated(fake, concurrency):
        async with Client(fake.url) as ready:
            await ready.facts()
        async with Counting(fake.url) as client:
            prompts = [prompt(letter * 100) for letter in "abcdef"]
            return await evaluate(prompts, [], client, concurrency=concurrency)

    with served(answer=answer) as fake:
        for concurrency in (1, 3):
            most.clear()
            answers = asyncio.run(evaluated(fake, concurrency))
            assert [answer.text for answer in answers] == list("abcdef")
            assert max(most) == concurrency


@pytest.mark.parametrize(
    ("settings", "model", "reason"),
    [
        ({"models": ("a", "b")}, None, "several models: choose one with --model: a, b"),
        ({"models": ("a", "b")}, "c", "model='c' is refused: the server has no such model"),
        ({"tokenizes": False}, None, "has no /tokenize, which measures the lengths of prompts"),
        ({"replies": {"/v1/models": {"data": None}}}, None, "/v1/models does not answer as vLLM's OpenAI server does"),
        ({"replies": {"/v1/models": []}}, None, "/v1/models does not answer as vLLM's OpenAI server does"),
        ({"replies": {"/tokenize": {"count": 1}}}, None, "/tokenize does not answer as vLLM's OpenAI server does"),
        ({"replies": {"/v1/completions": {"choices": []}}}, None, "/v1/completions does not answer as vLLM's"),
    ],
)
def test_servers_that_can_not_be_used(settings, model, reason):
    with served(**settings) as fake, pytest.raises(ServerError) as failed:
        run(fake, [prompt("a" * 100)], model=model)
    assert reason in str(failed.value)


def test_the_key_is_sent_and_a_base_url_may_end_in_v1():
    with served() as fake:
        fake.url += "/v1/"
        assert len(run(fake, [prompt("a" * 100)], api_key="secret")) == 2
        assert set(fake.keys) == {"Bearer secret"}
