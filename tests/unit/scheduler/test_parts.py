"""The parts of a scheduler: a feature is one class and one line, and a hook that no part has costs nothing."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module

import pytest
from vllm.lora.request import LoRARequest

from starling import features
from starling.engine_ext.engine_core import StarScheduler
from starling.scheduler.part import HOOKS, CorePart, hooks_of
from starling.vllm_compat.versions import release_of, vllm_version
from tests.unit.scheduler.simulation import Engine, make_config, make_scheduler

TOY = """
from starling.scheduler.part import CorePart


class ShortChunks(CorePart):
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


PARTS = (ShortChunks.make, lambda scheduler, config: None)
"""
"""A feature that makes each chunk at most 64 tokens, and notes what it is told; another part of it is off here."""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy as a feature: one folder, and one line. Returns its module."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "core.py").write_text(TOY)
    monkeypatch.setattr(features, "__path__", [*features.__path__, str(tmp_path)])
    monkeypatch.setattr(features, "FEATURES", (*features.FEATURES, "toy"))
    yield import_module("starling.features.toy.core")
    for name in ("starling.features.toy.core", "starling.features.toy"):
        del sys.modules[name]


def test_a_feature_is_a_folder_and_a_line_and_is_called_in_a_scheduler(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(StarScheduler, "feature_parts", features.parts_of_core())
    engine = Engine(make_scheduler(make_config(tmp_path), StarScheduler))
    engine.add("a", None, list(range(150)), max_tokens=1)
    engine.run()
    assert engine.scheduler.part(toy.ShortChunks).seen == [
        ("added", "a"),
        *(("scheduled", tokens) for tokens in (64, 64, 22)),
        ("pages freed", "a"),
    ]


def test_a_feature_s_hooks_come_in_the_order_of_the_features(toy):
    assert features.parts_of_core()[-2] == toy.ShortChunks.make


def test_a_hook_that_no_part_has_is_not_called(toy):
    hooks = hooks_of([CorePart(), toy.ShortChunks()])
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


class WaitsAStep(CorePart):
    """Lets one request wait in one step, as fair shares and reuse may."""

    waiting = ""

    def bound(self, request, start, num_tokens):
        return 0 if request.request_id == self.waiting else num_tokens


def test_a_request_that_waited_a_step_does_not_run_beside_more_adapters_than_fit(tmp_path):
    """vLLM 0.32 admits another adapter meanwhile, and asserts in the next step that all of them fit."""
    scheduler = make_scheduler(make_config(tmp_path, enable_lora=True, max_loras=1), StarScheduler)
    waits = WaitsAStep()
    scheduler.use_parts([waits])
    engine = Engine(scheduler)
    for number, name in enumerate("ab", start=1):
        engine.add(name, None, 150, lora_request=LoRARequest(name, number, str(tmp_path)))
    engine.step()
    waits.waiting = "a"
    engine.step()
    waits.waiting = ""
    engine.run()
    counts_running = release_of(vllm_version() or "") >= (0, 33)
    assert [set(step) for step in engine.steps[:3]] == ([{"a"}] * 3 if counts_running else [{"a"}, {"b"}, {"a"}])
    assert all({"a", "b"} != set(step) for step in engine.steps)
    assert engine.computed == {"a": 152, "b": 152}
