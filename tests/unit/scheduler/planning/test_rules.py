"""Which options an engine refuses to every request, as `starling doctor` prints them."""

from __future__ import annotations

import pytest

from starling.config.star import StarOptions
from starling.scheduler.planning.facts import EngineFacts, ReplicaSet
from starling.scheduler.planning.rules import refused_options

ONE = EngineFacts(128)
SEVERAL = EngineFacts(128, replicas=ReplicaSet(2))
ON_ONE_REPLICA = "(--data-parallel-size)"
NO_SCORES = (
    "star_dense_heads=0.1 is refused: the scores of this model's KV heads are not known. Allowed: 0, or a server with "
    "--star-heads and the file that `starling calibrate` makes."
)


@pytest.mark.parametrize(
    ("engine", "server", "refused"),
    [
        (SEVERAL, {}, [NO_SCORES]),
        (
            ONE,
            {},
            [
                NO_SCORES,
                f"star_replicas=2 is refused: this server has 1 {ON_ONE_REPLICA}. Allowed: auto, or up to 1.",
                f"star_shards='on' is refused: this server has one replica {ON_ONE_REPLICA}. Allowed: off.",
            ],
        ),
        (EngineFacts(128, ("a", "b")), {}, ["star='on' is refused: a; b. Allowed: off."]),
        (
            EngineFacts(None),
            {},
            ["star='on' is refused: the full-attention layers have no one KV page size. Allowed: off."],
        ),
        (
            EngineFacts(128, overlap_refusal="c", find_document_refusals=lambda: ("d",), replicas=ReplicaSet(2)),
            {},
            [
                "star_overlap_size=128 is refused: c. Allowed: 0.",
                NO_SCORES,
                "star_segments='auto' is refused: d. Allowed: off.",
            ],
        ),
        (
            EngineFacts(128, replicas=ReplicaSet(2, shards_refusal="e")),
            {},
            [NO_SCORES, "star_shards='on' is refused: e. Allowed: off."],
        ),
        (
            SEVERAL,
            {"overlap_size": 256},
            [
                NO_SCORES,
                "star_replicas=2 is refused: with star_overlap_size=256 each block needs the one before it. "
                "Allowed: auto or 1, or star_overlap_size=0 and star_dense_heads=0.",
                "star_shards='on' is refused: with star_overlap_size=256 each block needs the one before it. "
                "Allowed: off.",
            ],
        ),
    ],
    ids=["none", "one replica", "no star", "no page size", "the model", "no shards", "the server's overlap"],
)
def test_options_that_an_engine_refuses_to_every_request(engine, server, refused):
    assert refused_options(StarOptions(**server), engine) == refused
