"""The size of star blocks in a word: star_quality."""

from __future__ import annotations

import pytest

from starling.config.parsing import OptionError
from starling.config.quality import parse_quality_sizes
from starling.config.star import merge, parse_options
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import EngineFacts, KnownSegments, PromptFacts
from starling.scheduler.planning.rules import check_defaults

PAGE, TOKENS = 16, 40_000
ENGINE = EngineFacts(PAGE)


MEASURED = EngineFacts(PAGE, quality_sizes=parse_quality_sizes("fast=n/16,balanced=n/5,careful=dense", "sizes"))


def block_size(server: dict, request: dict | None = None, tokens: int = TOKENS, engine: EngineFacts = ENGINE) -> int:
    defaults = parse_options({"star": "on"} | server)
    options = None if request is None else parse_options(request)
    plan = decide(defaults, options, PromptFacts(tokens, [1] * tokens), engine).plan
    assert plan is not None
    return plan.block_size


@pytest.mark.parametrize(
    ("quality", "size"), [("fast", 4096), ("balanced", 8192), ("careful", 16384), (" Careful ", 16384)]
)
def test_a_word_is_a_share_of_the_prompt(quality, size):
    assert block_size({"star_quality": quality}) == size
    assert block_size({}, {"star_quality": quality}) == size
    assert block_size({}) == 8192


@pytest.mark.parametrize(("quality", "size"), [("fast", 2512), ("balanced", 8000)])
def test_a_word_is_what_the_server_says(quality, size):
    assert block_size({}, {"star_quality": quality}, engine=MEASURED) == size
    assert block_size({"star_quality": quality}, engine=MEASURED) == size
    assert block_size({}, engine=MEASURED) == 8000, "the default is balanced"
    assert block_size({"star_quality": quality}, {"star_block_size": 512}, engine=MEASURED) == 512
    assert block_size({"star_block_size": 512}, engine=MEASURED) == 512


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_a_word_may_be_dense(mode):
    options = parse_options({"star": mode, "star_min_tokens": 1000, "star_quality": "careful"})
    decision = decide(parse_options({}), options, PromptFacts(TOKENS, [1] * TOKENS), MEASURED)
    assert decision.plan is None
    assert decision.why == "on this server star_quality=careful is dense"


def documents(server: dict, request: dict | None, known: KnownSegments | None = None):
    options = None if request is None else parse_options(request)
    facts = PromptFacts(TOKENS, [1] * TOKENS, known)
    return decide(parse_options({"star": "on"} | server), options, facts, MEASURED)


def test_a_dense_word_of_a_request_goes_before_the_servers_documents():
    known = KnownSegments("messages", (100, 9000, 20_000))
    server = {"star_segments": "auto"}
    decision = documents(server, {"star_quality": "careful"}, known)
    assert (decision.plan, decision.why) == (None, "on this server star_quality=careful is dense")
    for request in (None, {"star_quality": "fast"}, {"star_quality": "careful", "star_segments": "auto"}):
        plan = documents(server, request, known).plan
        assert plan is not None and plan.documents


def test_a_server_whose_own_word_is_dense_is_refused():
    for server in ({"star": "on", "star_quality": "careful"}, {"star": "auto", "star_quality": "careful"}):
        with pytest.raises(OptionError, match="star_quality='careful' is refused: star_quality_sizes says that it is"):
            check_defaults(parse_options(server), MEASURED)
    for server in (
        {"star": "off", "star_quality": "careful"},
        {"star": "on"},
        {"star": "on", "star_quality": "careful", "star_segments": "auto"},
    ):
        check_defaults(parse_options(server), MEASURED)


def test_no_block_has_less_than_1024_tokens():
    assert block_size({"star_quality": "fast"}, tokens=4096) == 1024


def test_what_a_request_gives_replaces_what_says_the_same():
    assert block_size({"star_block_size": 512}, {"star_quality": "careful"}) == 16384
    assert block_size({"star_quality": "careful"}, {"star_block_size": 512}) == 512
    merged = merge(parse_options({"star_block_size": 512}), parse_options({"star_quality": None}))
    assert merged.block_size == 512


@pytest.mark.parametrize("size", [512, "n/8"])
def test_both_at_once_are_refused(size):
    both = {"star_quality": "fast", "star_block_size": size}
    reason = r"star_quality='fast' is refused: star_block_size=(512|n/8) is given too. Allowed: one of the two"
    with pytest.raises(OptionError, match=reason):
        block_size({}, both)
    with pytest.raises(OptionError, match=reason):
        check_defaults(parse_options({"star": "on"} | both), ENGINE)


def test_another_word_is_refused():
    with pytest.raises(OptionError, match="star_quality='best' is refused: it must be one of fast, balanced, careful"):
        parse_options({"star_quality": "best"})


def test_documents_have_their_own_lengths():
    ids = [1] * TOKENS
    star = parse_options({"star": "on", "star_segments": (100, 9000, 20_000), "star_quality": "fast"})
    for engine in (ENGINE, MEASURED):
        plan = decide(parse_options({}), star, PromptFacts(TOKENS, ids), engine).plan
        assert plan is not None
        assert plan.documents
        assert plan.block_size == 8192
