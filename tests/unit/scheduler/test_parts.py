"""The parts of a scheduler: a feature is one class and one line, and a hook that no part has costs nothing."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from starling.scheduler import star_scheduler
from starling.scheduler.part import HOOKS, CorePart, hooks_of
from starling.scheduler.star_scheduler import StarScheduler
from tests.unit.scheduler.simulation import Engine, make_config, make_scheduler


class ShortChunks(CorePart):
    """A toy: each chunk has at most 64 tokens, and it notes what it is told."""

    def __init__(self):
        self.seen = []

    def added(self, request):
        self.seen.append(("added", request.request_id))

    def bound(self, request, start, num_tokens):
        return min(num_tokens, 64)

    def scheduled(self, output):
        self.seen.append(("scheduled", output.total_num_scheduled_tokens))

    def pages_freed(self, request):
        self.seen.append(("pages freed", request.request_id))


def make_nothing(scheduler, config):
    """The part of a feature that is off here."""


def test_a_part_is_one_line_and_is_called_in_a_scheduler(tmp_path, monkeypatch):
    make = lambda scheduler, config: ShortChunks()  # noqa: E731
    monkeypatch.setattr(star_scheduler, "PARTS", (*star_scheduler.PARTS, make, make_nothing))
    engine = Engine(make_scheduler(make_config(tmp_path), StarScheduler))
    engine.add("a", None, list(range(150)), max_tokens=1)
    engine.run()
    assert engine.scheduler.part(ShortChunks).seen == [
        ("added", "a"),
        *(("scheduled", tokens) for tokens in (64, 64, 22)),
        ("pages freed", "a"),
    ]


def test_a_hook_that_no_part_has_is_not_called():
    hooks = hooks_of([CorePart(), ShortChunks()])
    assert set(hooks) == set(HOOKS)
    assert {name: len(of_name) for name, of_name in hooks.items() if of_name} == {
        "added": 1,
        "bound": 1,
        "scheduled": 1,
        "pages_freed": 1,
    }


class Around(CorePart):
    """Surrounds steps, or leaves them alone."""

    def __init__(self, name, surrounds, log):
        self.name, self.surrounds, self.log = name, surrounds, log

    def around_step(self):
        return self.entered() if self.surrounds else None

    @contextmanager
    def entered(self):
        self.log.append(self.name)
        yield


@pytest.mark.parametrize(
    ("surrounds", "entered"), [((True, True), ["a"]), ((False, True), ["b"]), ((False, False), [])]
)
def test_the_first_part_that_surrounds_a_step_has_it(tmp_path, surrounds, entered):
    """Two would each take waiting requests out of one queue, and put them back where the other does not expect them."""
    scheduler = make_scheduler(make_config(tmp_path), StarScheduler)
    log = []
    scheduler.use_parts(Around(name, one, log) for name, one in zip("ab", surrounds, strict=True))
    scheduler.schedule()
    assert log == entered
