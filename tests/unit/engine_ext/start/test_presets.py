"""Sets of options with a name: `--preset`."""

from __future__ import annotations

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from starling.config.entry import PRESETS, parse_config
from starling.config.parsing import OptionError
from starling.engine_ext.start import activation
from starling.engine_ext.start.activation import before_engine_config


def config(**entry):
    parsed = parse_config({"starling": entry})
    assert parsed is not None
    return parsed


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_turns_star_on_for_long_prompts(name):
    assert config(preset=name).star.mode == "auto"
    assert config(preset=name).star.min_tokens == PRESETS[name].entry["star_min_tokens"]


def test_documents_are_messages_where_they_are_to_be_found_again():
    assert [config(preset=name).star.segments for name in ("long", "rag", "agents")] == [None, "auto", "auto"]


def test_single_options_replace_those_of_a_preset():
    changed = config(preset="agents", star_min_tokens=9, scheduler={"shared_step_tokens": 64})
    assert (changed.star.mode, changed.star.min_tokens) == ("auto", 9)
    assert (changed.scheduling.fairness, changed.scheduling.shared_step_tokens) == ("on", 64)
    assert config(preset="agents", scheduler={"fairness": "off"}).scheduling.fairness == "off"


@pytest.mark.parametrize(("value", "hint"), [("ragg", ", did you mean rag"), ("x", ""), (3, ""), (["rag"], "")])
def test_another_name_is_refused(value, hint):
    with pytest.raises(OptionError) as refused:
        config(preset=value)
    assert f"is refused: there is no such preset{hint}. Allowed: long, rag, agents." in str(refused.value)


@pytest.mark.parametrize(
    ("name", "given", "page"), [("rag", None, 32), ("rag", 64, 64), ("agents", None, 32), ("long", None, None)]
)
def test_documents_get_small_pages_on_cpus_and_the_log_says_all(monkeypatch, tmp_path, name, given, page):
    logged: list[str] = []
    monkeypatch.setattr(activation.logger, "info", lambda text, *values: logged.append(text % values))
    entry = {"preset": name, "star_min_tokens": 77}
    args = AsyncEngineArgs(model=str(tmp_path), additional_config={"starling": entry}, block_size=given)
    before_engine_config(args)
    assert args.block_size == page
    (line,) = logged
    assert line.startswith(f"preset {name}: star=auto, star_min_tokens=77")
    assert line.endswith(f"--block-size {page}") is (page is not None)
