"""What the words of star_quality stand for on a server: star_quality_sizes."""

from __future__ import annotations

import pytest

from starling.config.entry import parse_config
from starling.config.parsing import OptionError
from starling.config.quality import size_text

SIZES = {"fast": "n/16", "balanced": "n/8", "careful": "dense"}


def parsed(value):
    config = parse_config({"starling": {"star_quality_sizes": value}})
    assert config is not None
    return config.quality_sizes


@pytest.mark.parametrize(
    "value",
    [
        SIZES,
        "fast=n/16,balanced=n/8,careful=dense",
        " Careful = DENSE , fast=N/16,balanced= n / 8",
        '{"Fast": "n/16", "balanced": "n/8", "careful": "dense"}',
    ],
)
def test_each_word_has_a_size(value):
    assert parsed(value) == {"fast": 16, "balanced": 8, "careful": 1}


def test_without_any_the_words_mean_what_the_study_found():
    assert parsed(None) is None
    assert [size_text(number) for number in (8, 1)] == ["n/8", "dense"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("fast=n/16,balanced=n/8", "careful has no size"),
        ({"fast": "n/8"}, "balanced, careful have no size"),
        (SIZES | {"fats": "n/8"}, "there is no such quality as 'fats', did you mean fast"),
        (SIZES | {"fast": 16}, "16 is no size"),
        (SIZES | {"fast": "n/0"}, "'n/0' is no size"),
        (SIZES | {"fast": "4096"}, "'4096' is no size"),
        (SIZES | {"balanced": "n/32"}, "balanced would have smaller star blocks than fast"),
        ("fast=n/8,fast=n/4,balanced=n/8,careful=n/8", "fast is given twice"),
        ("", "there is no such quality as ''"),
        ("auto", "there is no such quality as 'auto'"),
        (SIZES | {"fast": "n/1"}, "'n/1' is no size"),
        ('{"fast": "n/16"', 'there is no such quality as \'{"fast": "n/16"\''),
        ("x" * 5000, "there is no such quality as 'xxx"),
        (8, "it must be an object, or words and sizes"),
        ([], "it must be an object, or words and sizes"),
    ],
)
def test_what_is_no_size_of_each_word_is_refused(value, reason):
    with pytest.raises(OptionError) as refused:
        parsed(value)
    text = str(refused.value)
    assert text.startswith("starling.star_quality_sizes=")
    assert f"is refused: {reason}" in text and ". Allowed: fast=n/16,balanced=n/8,careful=dense, say" in text
    assert len(text) < 700
