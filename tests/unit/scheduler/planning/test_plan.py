"""The plan of a prompt: its sizes, and the keys that follow from them."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.config.parsing import OptionError
from starling.config.star import StarOptions, flat_name, merge, parse_options
from starling.scheduler.planning.facts import ONE_REPLICA, EngineFacts, ReplicaSet
from starling.scheduler.planning.plan import StarPlan, dense_keys, keys_attended, summary
from starling.scheduler.planning.request_metadata import (
    KEY,
    PageFetch,
    PageSource,
    PromptPart,
    RemoteShards,
    RequestMetadata,
    Shard,
    metadata_of,
)
from starling.scheduler.planning.rules import check_defaults, check_sizes
from starling.scheduler.planning.sizes import default_anchor_size, default_block_size
from tests.unit.masks import mask_of
from tests.unit.plans import make_plan

PAGE_SIZE = 16


def plan(
    num_prompt_tokens: int = 1000,
    defaults: dict | None = None,
    replica_set: ReplicaSet = ONE_REPLICA,
    **options,
) -> StarPlan | None:
    """The plan for a request with these options, given by their bare names."""
    server = parse_options({"mode": "on", "block_size": 64} | (defaults or {}), flat=False)
    request = parse_options({flat_name(key): value for key, value in options.items()}) if options else None
    return make_plan(num_prompt_tokens, server, request, PAGE_SIZE, replica_set)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, StarPlan(64, 16, 48, 500, 1000)),  # the query is 512 tokens, at most half of the prompt
        ({"num_prompt_tokens": 5000}, StarPlan(64, 16, 48, 4488, 5000)),
        ({"num_prompt_tokens": 201}, StarPlan(64, 16, 48, 101, 201)),
        ({"num_prompt_tokens": 1}, None),
        # A context that fits in one block has dense attention.
        ({"num_prompt_tokens": 128}, None),
        ({"num_prompt_tokens": 130}, StarPlan(64, 16, 48, 65, 130)),
        ({"block_size": "n/1"}, None),
        ({"mode": "auto", "min_tokens": 0, "block_size": 512}, None),
        ({"query_tokens": 0}, StarPlan(64, 16, 48, 999, 1000)),  # the last prompt token always attends to everything
        ({"query_tokens": 700}, StarPlan(64, 16, 48, 300, 1000)),
        ({"query_tokens": 1000}, None),  # its context is empty
        ({"anchor_size": 32, "overlap_size": 16}, StarPlan(64, 32, 16, 500, 1000)),
        ({"anchor_size": 0}, StarPlan(64, 0, 0, 500, 1000)),
        # One of A and O alone: the paper's star blocks have no overlap, and A + O = B.
        ({"anchor_size": 32}, StarPlan(64, 32, 0, 500, 1000)),
        ({"overlap_size": 0}, StarPlan(64, 64, 0, 500, 1000)),
        ({"overlap_size": 48}, StarPlan(64, 16, 48, 500, 1000)),
        ({"overlap_size": 64}, StarPlan(64, 16, 64, 500, 1000)),
        ({"defaults": {"anchor_size": 32}, "overlap_size": 16}, StarPlan(64, 32, 16, 500, 1000)),
        ({"defaults": {"overlap_size": 0}, "block_size": 128}, StarPlan(128, 128, 0, 500, 1000)),
        # Blocks that have to be independent get the paper's anchor, unless an overlap is asked for.
        ({"replica_set": ReplicaSet(2), "replicas": 1}, StarPlan(64, 64, 0, 500, 1000)),
        ({"replica_set": ReplicaSet(2), "overlap_size": 32}, StarPlan(64, 32, 32, 500, 1000)),
        ({"replica_set": ReplicaSet(2, "they shift")}, StarPlan(64, 16, 48, 500, 1000)),
        ({"block_size": "n/4"}, StarPlan(256, 32, 224, 500, 1000)),  # 250, rounded up to whole pages
        ({"block_size": "n/3000"}, StarPlan(16, 16, 0, 500, 1000)),
        ({"defaults": {"block_size": "n/3"}}, StarPlan(336, 48, 288, 500, 1000)),
        # Values as people type them.
        ({"block_size": " N / 4 "}, StarPlan(256, 32, 224, 500, 1000)),
        ({"block_size": "32", "mode": "ON", "query_tokens": "0.2k"}, StarPlan(32, 16, 16, 800, 1000)),
        ({"mode": True, "num_prompt_tokens": 9000, "block_size": "2K"}, StarPlan(2048, 128, 1920, 8488, 9000)),
        ({"mode": 1}, StarPlan(64, 16, 48, 500, 1000)),  # what vLLM makes of `true`
        ({"mode": "false"}, None),
        (
            {"defaults": {"anchor_size": 64, "overlap_size": 64}, "block_size": 32},
            StarPlan(32, 32, 32, 500, 1000),
        ),
        # A default query has at most half of the prompt.
        ({"defaults": {"query_tokens": 900}}, StarPlan(64, 16, 48, 500, 1000)),
        ({"mode": "off"}, None),
        ({"mode": "auto", "min_tokens": 1001}, None),
        ({"mode": "auto", "min_tokens": 1000}, StarPlan(64, 16, 48, 500, 1000)),
        ({"mode": "auto", "min_tokens": 1001, "query_tokens": 1001}, None),  # its query is not cut off
        ({"defaults": {"mode": "off"}}, None),
        ({"defaults": {"mode": "off"}, "mode": "on"}, StarPlan(64, 16, 48, 500, 1000)),
        ({"defaults": {"mode": "off"}, "mode": "off", "block_size": 32}, None),
    ],
)
def test_a_plan_has_the_sizes_of_the_options(kwargs, expected):
    assert plan(**kwargs) == expected


REFUSED = [
    ({"star_blocksize": 64}, "star_blocksize", "no such"),
    ({"star_plan": [64, 64, 0, 9, 10]}, "star_plan", "no such"),
    ({"star": "yes"}, "star", "one of off, on, auto"),
    ({"star_block_size": 64.0}, "star_block_size", "whole number"),
    ({"star_block_size": True}, "star_block_size", "whole number"),
    ({"star_block_size": [64]}, "star_block_size", "whole number"),
    ({"star_anchor_size": -16}, "star_anchor_size", "0 or more"),
    ({"star_block_size": 0}, "star_block_size", "1 or more"),
    ({"star_block_size": "n/0"}, "star_block_size", "a share such as n/8"),
    ({"star_block_size": "1.5"}, "star_block_size", "a share such as n/8"),
    ({"star_block_size": "n/8.5"}, "star_block_size", "a share such as n/8"),
    ({"star_block_size": "an/8"}, "star_block_size", "a share such as n/8"),
    ({"star_anchor_size": "9" * 40}, "star_anchor_size", "whole number"),
    ({"star_overlap_siz": 16}, "star_overlap_siz", "no such star option, did you mean star_overlap_size"),
    ({"star_block_size": 40}, "star_block_size", "KV page of 16"),
    ({"star_anchor_size": 8}, "star_anchor_size", "KV page of 16"),
    ({"star_overlap_size": 8}, "star_overlap_size", "KV page of 16"),
    ({"star_anchor_size": 80}, "star_anchor_size", "larger than the star block of 64"),
    ({"star_overlap_size": 80}, "star_overlap_size", "larger than the star block of 64"),
    ({"star_block_size": 32, "star_anchor_size": 64}, "star_anchor_size", "larger than the star block of 32"),
    ({"star_query_tokens": 1001}, "star_query_tokens", "only 1000 tokens"),
    ({"star_replicas": 0}, "star_replicas", "auto, or a whole number of replicas"),
    ({"star_replicas": "all"}, "star_replicas", "auto, or a whole number of replicas"),
    ({"star_replicas": True}, "star_replicas", "auto, or a whole number of replicas"),
    ({"star_replicas": 2}, "star_replicas", "this server has 1"),
    ({"star_shards": "auto"}, "star_shards", "off, on"),
    ({"star_shards": "on"}, "star_shards", "this server has one replica"),
]


@pytest.mark.parametrize(("request_options", "name", "reason"), REFUSED)
def test_bad_options_are_refused_by_name_value_reason_and_allowed_set(request_options, name, reason):
    with pytest.raises(OptionError) as refused:
        make_plan(1000, {"star": "on", "star_block_size": 64}, request_options, PAGE_SIZE)
    message = str(refused.value)
    assert refused.value.name == name
    assert message.startswith(f"{name}={request_options[name]!r} is refused: ")
    assert reason in message
    assert "Allowed: " in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"block_size": "n/8.5"},
            "block_size='n/8.5' is refused: it must be a whole number of tokens, 1 or more, or a",
        ),
        ({"mode": "maybe"}, "mode='maybe' is refused: it must be one of off, on, auto.*Allowed: off, on, auto."),
        ({"blok_size": 64}, "blok_size=64 is refused: there is no such star option, did you mean block_size"),
        ({"segments": (4, 4)}, "segments=.* is refused: 4 follows 4"),
    ],
)
def test_options_of_a_program_are_refused_by_the_names_of_their_fields(options, says):
    """Not with pydantic's text, whose names and links say nothing to a user."""
    with pytest.raises(OptionError, match=says):
        StarOptions(**options)
    assert StarOptions(block_size="n/8", mode=True) == parse_options({"star_block_size": "n/8", "star": "on"})


SHIFTED = ReplicaSet(2, "the model has KV shifting")


@pytest.mark.parametrize(
    ("options", "replica_set", "replicas"),
    [
        ({}, ReplicaSet(), 1),
        ({}, ReplicaSet(2), 2),
        ({}, ReplicaSet(64), 7),  # 8 blocks: each of 7 replicas has the anchor and one block, or two blocks
        ({"replicas": "auto"}, ReplicaSet(3), 3),
        ({"replicas": 1}, ReplicaSet(2), 1),
        ({"replicas": 2}, ReplicaSet(3), 2),
        ({"query_tokens": 872}, ReplicaSet(2), 1),  # two blocks: the second replica would compute two, too
        ({}, SHIFTED, 1),
        ({"replicas": 1}, SHIFTED, 1),
        ({"overlap_size": 16}, ReplicaSet(2), 1),
    ],
)
def test_a_plan_has_the_number_of_replicas_that_prefill_it(options, replica_set, replicas):
    made = plan(replica_set=replica_set, **options)
    assert made is not None
    assert made.replicas == summary(made)["replicas"] == replicas


@pytest.mark.parametrize(
    ("options", "replica_set", "message"),
    [
        ({"replicas": 3}, ReplicaSet(2), "star_replicas=3 is refused: this server has 2 .*Allowed: auto, or up to 2"),
        ({"replicas": 2}, SHIFTED, "star_replicas=2 is refused: the model has KV shifting. Allowed: auto or 1"),
        (
            {"replicas": 2, "overlap_size": 16},
            ReplicaSet(2),
            "star_overlap_size=16 each block needs .*star_overlap_size=0",
        ),
        # Refused also for a prompt that runs dense.
        ({"mode": "auto", "min_tokens": 5000, "replicas": 3}, ReplicaSet(2), "star_replicas=3"),
    ],
)
def test_more_replicas_than_can_be_used_are_refused(options, replica_set, message):
    with pytest.raises(OptionError, match=message):
        plan(replica_set=replica_set, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"block_size": 32}, "star_block_size"),  # star is off by default, so a size alone would have no effect
        ({"mode": "auto", "min_tokens": 5000, "block_size": 40}, "star_block_size"),  # refused also for a short prompt
    ],
)
def test_options_without_effect_and_bad_sizes_are_refused_for_dense_prompts(options, name):
    with pytest.raises(OptionError) as refused:
        plan(defaults={"mode": "off"}, **options)
    assert refused.value.name == name


@pytest.mark.parametrize(
    "star",
    [{"block_size": 100}, {"block_size": 64, "anchor_size": 128}, {"block_size": 64, "overlap_size": 24}],
)
def test_server_defaults_that_do_not_fit_the_page_are_refused(star):
    for mode in ("off", "on"):
        with pytest.raises(OptionError, match="refused"):
            check_sizes(parse_options(star | {"mode": mode}, flat=False), PAGE_SIZE)


def test_the_built_in_defaults_fit_every_page_size():
    for page_size in (16, 32, 48, 64, 128, 256, 1024, 1600):
        check_sizes(StarOptions(mode="on"), page_size)
        plan = make_plan(40_000, StarOptions(mode="on"), None, page_size)
        assert plan.block_size == -(-8192 // page_size) * page_size
        assert plan.anchor_size == -(-128 // page_size) * page_size
        assert plan.anchor_size + plan.overlap_size == plan.block_size


@pytest.mark.parametrize(
    ("num_prompt_tokens", "block_size"),
    [(1, 1024), (8192, 1024), (8193, 2048), (16_384, 2048), (16_385, 4096), (65_536, 8192), (65_537, 16_384)],
)
def test_the_default_block_grows_with_the_prompt_by_powers_of_two(num_prompt_tokens, block_size):
    assert default_block_size(num_prompt_tokens, PAGE_SIZE) == block_size


def test_the_default_anchor_is_a_small_part_of_its_block():
    sizes = {block_size: default_anchor_size(block_size, PAGE_SIZE) for block_size in (16, 128, 256, 512, 1024, 8192)}
    assert sizes == {16: 16, 128: 16, 256: 32, 512: 64, 1024: 128, 8192: 128}


def test_a_request_replaces_only_the_defaults_of_its_own_options():
    server = parse_options({"mode": "auto", "block_size": 64, "query_tokens": 7}, flat=False)
    merged = merge(server, parse_options({"star_block_size": 128}))
    assert (merged.mode, merged.block_size, merged.query_tokens) == ("auto", 128, 7)


def test_the_plan_travels_in_extra_args():
    star = StarPlan(64, 32, 16, 500, 1000)

    def received(extra_args):
        return metadata_of(SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args))).plan

    assert received({KEY: RequestMetadata(star).to_wire()}) == star
    assert received({"other": 1}) is None
    assert received(None) is None
    assert metadata_of(SimpleNamespace(sampling_params=None)).plan is None  # a pooling request


def test_metadata_is_decoded_once():
    """Every later reader of the request gets the object that the first one decoded."""
    metadata = RequestMetadata(
        StarPlan(64, 32, 0, 500, 1000),
        PromptPart("a", 64, 32),
        PageFetch((PageSource(64, [3, 4], [{"name": "rank"}], 7),)),
        RemoteShards("a", (Shard("b", 64, 128, [{"name": "rank"}]),)),
    )
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(metadata.to_wire()))
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={KEY: wire}))
    assert metadata_of(request) == metadata
    assert metadata_of(request) is metadata_of(request)
    sent = pickle.loads(pickle.dumps(request))  # as a worker gets it
    assert metadata_of(sent) == metadata


@st.composite
def plans(draw) -> StarPlan:
    page_size = 4
    block_size = page_size * draw(st.integers(1, 8))
    sizes = st.integers(0, block_size // page_size).map(lambda num_pages: num_pages * page_size)
    num_prompt_tokens = draw(st.integers(1, 120))
    return StarPlan(
        block_size, draw(sizes), draw(sizes), draw(st.integers(0, num_prompt_tokens - 1)), num_prompt_tokens
    )


@given(plans(), st.data())
def test_pieces_cover_the_span_and_see_the_keys_of_the_mask(star, data):
    """The pieces of any span tile it, and each token's keys are those of its row in the explicit mask."""
    start = data.draw(st.integers(0, star.num_prompt_tokens - 1))
    end = data.draw(st.integers(start + 1, star.num_prompt_tokens))
    mask = mask_of(star, star.num_prompt_tokens)
    position = start
    for piece_start, piece_end, keys in star.split(start, end):
        assert piece_start == position < piece_end
        assert all(first % 4 == 0 for first, _ in keys)
        for query in range(piece_start, piece_end):
            seen = [key for first, stop in keys for key in range(first, stop) if key <= query]
            assert seen == mask[query].nonzero()[:, 0].tolist()
        position = piece_end
    assert position == end


@given(plans())
def test_keys_attended_are_those_of_the_mask(star):
    assert keys_attended(star) == int(mask_of(star, star.num_prompt_tokens).sum())
    assert dense_keys(star.num_prompt_tokens) == star.num_prompt_tokens * (star.num_prompt_tokens + 1) // 2


@pytest.mark.parametrize(
    ("server", "options", "replica_set", "shards"),
    [
        ({}, {}, ReplicaSet(3), False),
        ({}, {"shards": "on"}, ReplicaSet(3), True),
        ({"shards": "on"}, {}, ReplicaSet(3), True),
        ({"shards": "on"}, {"shards": "off"}, ReplicaSet(3), False),
        ({"shards": "on"}, {"replicas": 1}, ReplicaSet(3), False),  # the default has no effect
        ({"shards": "on"}, {"overlap_size": 16}, ReplicaSet(3), False),
        (
            {},
            {"shards": "on", "block_size": 512, "query_tokens": 9},
            ReplicaSet(3),
            False,
        ),  # two blocks run on one replica
    ],
)
def test_a_plan_has_whether_its_kv_stays_on_the_replicas_that_computed_it(server, options, replica_set, shards):
    made = plan(defaults=server, replica_set=replica_set, **options)
    assert made.shards == summary(made)["shards"] == shards
    assert msgspec.convert(msgspec.to_builtins(made), StarPlan) == made


@pytest.mark.parametrize(
    ("options", "replica_set", "reason"),
    [
        ({}, ReplicaSet(1), "this server has one replica"),
        ({}, SHIFTED, "the model has KV shifting"),
        ({}, ReplicaSet(2, None, "wired on CPU only"), "wired on CPU only"),
        ({"replicas": 1}, ReplicaSet(2), "star_replicas=1 keeps the prompt on one replica"),
        ({"overlap_size": 16}, ReplicaSet(2), "with star_overlap_size=16 each block needs the one before it"),
    ],
)
def test_shards_without_effect_are_refused(options, replica_set, reason):
    with pytest.raises(OptionError, match=rf"star_shards='on' is refused: {reason}.* Allowed: off\."):
        plan(replica_set=replica_set, shards="on", **options)


@pytest.mark.parametrize(
    ("star", "engine", "message"),
    [
        ({"mode": "on"}, EngineFacts(16, ("no GPU",)), "star='on' is refused: no GPU. Allowed: off."),
        ({"mode": "auto"}, EngineFacts(None), "star='auto' is refused: the full-attention layers have no one KV page"),
        ({"overlap_size": 16}, EngineFacts(16, overlap_refusal="its window"), "star_overlap_size=16 is refused: its w"),
        ({"segments": [4, 5]}, EngineFacts(16), "star_segments=(4, 5) is refused: offsets are those of one prompt"),
        (
            {"segments": "auto", "block_size": "n/4"},
            EngineFacts(16),
            "star_block_size='n/4' is refused: the borders of documents would move",
        ),
        (
            {"mode": "on", "segments": "auto"},
            EngineFacts(16, find_document_refusals=lambda: ("M-RoPE", "fp8")),
            "star_segments='auto' is refused: M-RoPE; fp8. Allowed: off.",
        ),
        (
            {"segments": "<s>", "overlap_size": 16},
            EngineFacts(16),
            "star_overlap_size=16 is refused: no document sees the one before it. Allowed: 0.",
        ),
        ({"replicas": 2}, EngineFacts(16), "star_replicas=2 is refused: this server has 1"),
        ({"shards": "on"}, EngineFacts(16), "star_shards='on' is refused: this server has one replica"),
    ],
)
def test_defaults_that_no_prompt_could_use_are_refused(star, engine, message):
    with pytest.raises(OptionError) as refused:
        check_defaults(parse_options(star, flat=False), engine)
    assert str(refused.value).startswith(message)


def test_a_default_of_documents_is_of_no_harm_where_star_is_off():
    check_defaults(parse_options({"star_segments": "auto"}), EngineFacts(None, ("no",), lambda: ("M-RoPE",)))
