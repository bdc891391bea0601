"""Which cached prompts are still there when other prompts have filled the memory, by vLLM's own block pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import RequestStatus

from starling.config.parsing import OptionError
from starling.config.star import parse_options
from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.features.retention.core import MAX_SESSIONS, RetainedPages
from starling.features.retention.front import Retention
from starling.scheduler.planning.decide import Decision, decide
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import RequestMetadata
from tests.unit.scheduler.simulation import Engine, make_config, make_scheduler, random_ids

PAGE, PAGES = 8, 40
LENGTH = 8 * PAGE + 3
KINDS = {"v1": (StarScheduler, False, 0), "async v2": (AsyncStarScheduler, True, 1)}
DOCUMENTS = StarPlan(64, 16, 0, 80, 91, documents=((0, 16), (16, 48), (48, 64), (64, 80)))
"""A head, three documents, and a question."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("models"), block_size=PAGE)


@pytest.fixture(params=KINDS)
def engine(request, config) -> Engine:
    scheduler_type, v2, ahead = KINDS[request.param]
    return Engine(make_scheduler(config, scheduler_type, PAGE, PAGES, v2), ahead=ahead, page_size=PAGE)


def ask(engine: Engine, name: str, ids: list[int], words=None, plan: StarPlan | None = None, **more) -> int:
    """Run a prompt; returns how many of its tokens were cached."""
    engine.add(name, plan, ids, metadata=RequestMetadata(retention=words), **more)
    engine.run()
    engine.check_pages()
    return engine.cached[name]


def flood(engine: Engine, name: str, pages: int) -> None:
    """Use so many pages for prompts of others."""
    for number in range(pages // 9):
        ask(engine, f"{name}-{number}", random_ids(len(name) * 100 + number, 9 * PAGE - 4))


def test_a_prompt_that_is_to_stay_is_there_where_others_have_made_room(engine: Engine) -> None:
    kept, plain = random_ids(1, LENGTH), random_ids(2, LENGTH)
    ask(engine, "kept", kept, "high")
    ask(engine, "plain", plain)
    flood(engine, "others", 45)
    assert ask(engine, "kept again", kept) == 8 * PAGE
    assert ask(engine, "plain again", plain) == 0


def test_a_prompt_that_is_to_go_makes_room_before_older_ones(engine: Engine) -> None:
    older, gone = random_ids(1, LENGTH), random_ids(2, LENGTH)
    ask(engine, "older", older)
    ask(engine, "gone", gone, "low")
    flood(engine, "others", 27)
    assert ask(engine, "older again", older) == 8 * PAGE
    assert ask(engine, "gone again", gone) == 0


def test_each_document_stays_as_is_said_of_it(engine: Engine) -> None:
    ids = random_ids(1, 91)
    ask(engine, "documents", ids, ("high", "low", "high"), DOCUMENTS)
    flood(engine, "others", 45)
    engine.add("again", DOCUMENTS, ids)
    engine.run()
    assert engine.computed["again"] == 16 + 11 + 2  # the second document, the question, and the output but for its end


def test_documents_that_others_have_stay_where_a_prompt_that_is_to_go_adopts_them(engine: Engine) -> None:
    """The second prompt has another first document, and finds the head and the other documents."""
    shared = random_ids(1, 91)
    ask(engine, "first", shared, plan=DOCUMENTS)
    ask(engine, "batch", [*shared[:16], *random_ids(2, 32), *shared[48:]], "low", DOCUMENTS)
    assert engine.computed["batch"] == 32 + 11 + 2
    flood(engine, "others", 27)
    engine.add("again", DOCUMENTS, shared)
    engine.run()
    assert engine.computed["again"] == 11 - PAGE + 2, "all is found but the end of the question"


def test_a_session_that_comes_back_finds_its_prompt_until_it_starts_anew(engine: Engine) -> None:
    """Compaction: the session's next prompt is a summary, and what it had before stays by its last use alone."""
    first, summary = random_ids(1, LENGTH), random_ids(2, LENGTH)
    ask(engine, "turn 1", first, session_id="agent")
    flood(engine, "others", 45)
    assert ask(engine, "turn 2", first, session_id="agent") == 8 * PAGE
    ask(engine, "compacted", summary, session_id="agent")
    flood(engine, "more", 45)
    assert ask(engine, "turn 3", summary, session_id="agent") == 8 * PAGE
    assert ask(engine, "before", first) == 0


def test_a_turn_that_is_ended_before_its_prompt_is_computed_takes_nothing_from_its_session(engine: Engine) -> None:
    first = random_ids(1, LENGTH)
    ask(engine, "turn 1", first, session_id="agent")
    engine.add("aborted", None, random_ids(2, LENGTH), session_id="agent")
    engine.scheduler.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    flood(engine, "others", 45)
    assert ask(engine, "turn 2", first, session_id="agent") == 8 * PAGE


def test_a_page_is_of_one_session(engine: Engine) -> None:
    for number in range(5):
        ask(engine, f"turn of {number}", random_ids(1, LENGTH), session_id=f"agent {number}")
    assert sum(map(len, engine.scheduler.part(RetainedPages).sessions.values())) <= PAGES


def test_a_page_that_was_to_make_room_does_not_once_another_prompt_has_found_it(engine: Engine) -> None:
    shared = random_ids(1, LENGTH)
    ask(engine, "first", shared, "low")
    assert ask(engine, "second", shared) == 8 * PAGE
    flood(engine, "others", 18)
    assert ask(engine, "third", shared) == 8 * PAGE


def test_sessions_of_other_salts_are_others(engine: Engine) -> None:
    first = random_ids(1, LENGTH)
    ask(engine, "turn 1", first, session_id="agent", cache_salt="ours")
    ask(engine, "guessed", random_ids(2, LENGTH), session_id="agent", cache_salt="theirs")
    flood(engine, "others", 45)
    assert ask(engine, "turn 2", first, session_id="agent", cache_salt="ours") == 8 * PAGE


def test_what_a_session_had_is_another_ones_where_that_has_it_now(engine: Engine) -> None:
    shared = random_ids(1, LENGTH)
    ask(engine, "a", shared, session_id="a")
    ask(engine, "b", shared, session_id="b")
    ask(engine, "a anew", random_ids(2, LENGTH), session_id="a")
    flood(engine, "others", 45)
    assert ask(engine, "b again", shared, session_id="b") == 8 * PAGE


@pytest.mark.parametrize("word", ["low", "normal"])
def test_a_request_lets_no_page_go_that_a_session_has(engine: Engine, word: str) -> None:
    shared = random_ids(1, LENGTH)
    ask(engine, "turn 1", shared, session_id="agent")
    ask(engine, "a batch", [*shared[: 4 * PAGE], *random_ids(2, LENGTH)], word)
    flood(engine, "others", 45)
    assert ask(engine, "turn 2", shared, session_id="agent") == 8 * PAGE


def test_a_request_that_makes_room_leaves_what_its_prompt_has_found(engine: Engine) -> None:
    """Instructions that all prompts share are not the first to go since a batch is."""
    shared = random_ids(1, 4 * PAGE)
    ask(engine, "first", [*shared, *random_ids(2, LENGTH)])
    ask(engine, "batch", [*shared, *random_ids(3, LENGTH)], "low")
    flood(engine, "others", 18)
    assert ask(engine, "again", [*shared, *random_ids(4, LENGTH)]) == 4 * PAGE
    assert not engine.scheduler.part(RetainedPages).found


def test_normal_takes_a_request_out_of_its_session(engine: Engine) -> None:
    first, once = random_ids(1, LENGTH), random_ids(2, LENGTH)
    ask(engine, "turn 1", first, session_id="agent")
    ask(engine, "once", once, "normal", session_id="agent")
    flood(engine, "others", 45)
    assert ask(engine, "turn 2", first, session_id="agent") == 8 * PAGE
    assert ask(engine, "once again", once) == 0


def test_retained_pages_are_given_out_where_a_prompt_needs_them(engine: Engine) -> None:
    for number in range(6):
        ask(engine, f"kept {number}", random_ids(number, LENGTH), "high")
    ask(engine, "long", random_ids(9, 38 * PAGE), max_tokens=1)
    assert engine.scheduler.reset_prefix_cache()


def test_no_more_sessions_are_known_than_so_many(config, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_scheduler(config, StarScheduler, PAGE, PAGES), page_size=PAGE)
    part = engine.scheduler.part(RetainedPages)
    for number in range(MAX_SESSIONS + 5):
        part._let_go(number, set())
    assert len(part.sessions) == MAX_SESSIONS


@pytest.mark.parametrize(
    ("entry", "more"), [({"scheduler": {"retained_share": 0}}, {}), ({}, {"enable_prefix_caching": False})]
)
def test_a_server_that_retains_nothing_has_vllms_own_queue(tmp_path, entry, more) -> None:
    scheduler = make_scheduler(make_config(tmp_path, entry, block_size=PAGE, **more), StarScheduler, PAGE, PAGES)
    assert scheduler.part(RetainedPages) is None


# Hints of vLLM's own form.


def hinted(front: Retention, *actions: KvHintAction, said: str | None = None) -> str | tuple[str, ...] | None:
    hints = KvHintsEnvelope("1", "message", list(actions))
    return front.hinted(Decision(None, None, 64, retention=said), SimpleNamespace(kv_hints=hints), ENGINE).retention


def action(kind: str = "star_retention", version: str = "1", **payload) -> KvHintAction:
    return KvHintAction("id", kind, version, payload)


def test_a_hint_says_what_the_option_says_and_the_option_wins(config) -> None:
    front = Retention(config)
    assert hinted(front) is None
    assert hinted(front, action("prefetch", url="..."), action(retention="high")) == "high"
    assert hinted(front, action(retention="high"), said="low") == "low"
    assert front.hinted(Decision(None, None, 64), SimpleNamespace(kv_hints=None), ENGINE).retention is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (action(version="2", retention="high"), "kv_hints.star_retention='2' is refused: there is no such version"),
        (action(retention="hihg"), "kv_hints.star_retention.retention='hihg' is refused: .* did you mean high"),
        (action(retention=["high"]), "star_retention=.* is refused: the prompt has no documents"),
        (action(), "it must say the retention alone"),
        (action(retention="high", mode="on"), "it must say the retention alone"),
    ],
)
def test_a_hint_that_can_not_be_followed_is_refused(config, wrong, reason) -> None:
    with pytest.raises(OptionError, match=reason):
        hinted(Retention(config), wrong)


# What a request says, held against its plan.

ENGINE = EngineFacts(PAGE, token_of=lambda text: 7)
PROMPT = PromptFacts(64, [7 if index in (8, 24, 40, 56) else 1 for index in range(64)])


def decided(engine: EngineFacts = ENGINE, **options):
    return decide(parse_options({"star": "auto", "star_min_tokens": 16}), parse_options(options), PROMPT, engine)


def test_a_word_needs_no_star_and_a_list_needs_documents() -> None:
    assert decide(parse_options({}), parse_options({"star_retention": "Low"}), PROMPT, ENGINE).retention == "low"
    found = decided(star_segments="<doc>", star_block_size=32, star_retention=["high", "low", "normal"])
    assert (found.retention, len(found.plan.documents)) == (("high", "low", "normal"), 4)
    assert RequestMetadata.from_wire(RequestMetadata(found.plan, retention=found.retention).to_wire()).retention == (
        found.retention
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"star_retention": "hihg"}, "it must be low, normal or high, or a list .* did you mean high"),
        ({"star_retention": ["high"]}, "the prompt has no documents"),
        ({"star_retention": ["high"], "star": "off"}, "the prompt has no documents: star is off"),
        (
            {"star_retention": ["high"] * 2, "star_segments": "<doc>", "star_block_size": 32},
            "it has 2 words, and the prompt has 3 documents",
        ),
    ],
)
def test_what_has_no_effect_is_refused(options, reason) -> None:
    with pytest.raises(OptionError, match=reason):
        decided(**options)


def test_a_server_that_retains_nothing_refuses_the_option() -> None:
    with pytest.raises(OptionError, match="star_retention='high' is refused: this server can't follow it: because"):
        decided(EngineFacts(PAGE, retention_refusals=("because",)), star_retention="high")
