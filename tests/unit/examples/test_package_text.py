"""The text from installed packages: which files it has, its names, and what its tokens stand for."""

from __future__ import annotations

import sysconfig

import pytest
import torch

from examples import package_text
from examples.package_text import (
    encode,
    marked,
    names_in,
    read_packages,
    rename,
    token_bytes,
    train_tokenizer,
    without_strings,
)
from examples.stdlib_text import Text


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})

    def lines(name: str, count: int = 30) -> str:
        return "\n".join(f"function_{name}_{i} = lambda argument: argument" for i in range(count))

    files = {
        "one/b.py": lines("b"),
        "one/a.py": lines("a"),
        "one/part/copy.py": lines("a", 20) + "\n" + lines("new", 10),  # mostly lines that occurred before
        "one/part/other.py": lines("a", 10) + "\n" + lines("other", 20),
        "one/tests/test.py": lines("test"),
        "one/_vendor/c.py": lines("vendored"),
        "one/short.py": "x = 1\n",
        "two/z.py": lines("z"),
        "two/again.py": lines("b"),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return files


def test_files_in_order_without_copies_tests_and_vendored_packages(packages):
    found = read_packages(("one", "two"), set())
    assert found == [packages[name] for name in ("one/a.py", "one/b.py", "one/part/other.py", "two/z.py")]


def test_at_most_so_many_bytes_of_a_package(packages):
    assert read_packages(("one", "two"), set(), most=10) == [packages["one/a.py"], packages["two/again.py"]]


def test_a_package_that_is_not_installed_is_named(packages):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_packages(("one", "absent"), set())


SOURCE = """
'''Title.'''
# A comment.
class Thing(Base):
    '''Only a docstring.'''

def go(self, n: int = 0x1F) -> str:
    '''What it does.'''
    return f"n is {n}" + 'text' + str(b'bytes', 1e5)
"""
WITHOUT = """class Thing(Base):
    pass

def go(self, n: int=31) -> str:
    return f'{n}' + '' + str('', 100000.0)"""


def test_comments_and_the_contents_of_strings_are_left_out():
    assert without_strings(SOURCE) == WITHOUT
    assert without_strings("print 'text'") is None


def test_keywords_and_builtins_are_no_names():
    assert names_in(WITHOUT) == ["Thing", "Base", "go", "n", "n"]
    assert marked("f(f'{a}', 1e5, __name__)") == "\ue000(f'{\ue000}', 1e5, __name__)"


def test_the_tokens_of_renamed_windows_are_a_text_with_other_names():
    texts = [WITHOUT, "first = second(third)\nfirst(é漢, ' \t\x00')"] * 3
    tokenizer, names = train_tokenizer(texts, vocabulary=300, syllables=30), {}
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 0
    stream = encode(texts, tokenizer, names)
    assert torch.equal(stream, encode(texts, train_tokenizer(texts, vocabulary=300, syllables=30), {}))
    assert (stream == 0).sum() == len(texts) and (stream >= 300).sum() == sum(len(names_in(text)) for text in texts)
    text = Text(stream, stream, "", token_bytes(tokenizer), tokenizer, syllables=30)
    end = (stream == 0).nonzero()[0].item()
    longer = torch.cat([stream[:end].long(), torch.zeros(2 * len(names_in(WITHOUT)), dtype=torch.int64)])
    rows = longer.expand(3, -1)
    renamed = rename(rows, text, seed=1)
    assert renamed.shape == rows.shape and renamed.dtype == rows.dtype and renamed.max() < 300
    assert torch.equal(renamed, rename(rows, text, seed=1)) and not torch.equal(renamed[0], renamed[1])
    for row in renamed:
        decoded = tokenizer.decode(row)
        assert text.token_bytes[row].sum() == len(decoded.encode())
        assert marked(decoded) == marked(WITHOUT)
        one_to_one = set(zip(names_in(WITHOUT), names_in(decoded), strict=True))
        assert len(one_to_one) == len(dict(one_to_one)) == len({new for _, new in one_to_one}) == 4
        assert all(len(new) == 2 * package_text.NAME_TOKENS for _, new in one_to_one)
    assert len({tuple(names_in(tokenizer.decode(row))) for row in renamed}) > 1
    cut = rename(rows[:1, :9], text, seed=1)
    assert torch.equal(cut, renamed[:1, :9])  # what the names push out is cut off


def test_syllables_are_no_pieces_of_other_text():
    """The text between names has no token of a name, although words like `def` have their letters."""
    texts = ["def go(one):\n    assert one is not None\n    yield from (one, two)"] * 9
    tokenizer = train_tokenizer(texts, vocabulary=340, syllables=64)
    syllables = {tokenizer.convert_ids_to_tokens(token) for token in range(276, 340)}
    assert len(syllables) == 64 and "de" not in syllables
    stream = encode(texts, tokenizer, {})
    assert ((stream < 276) | (stream >= 340)).all()


def test_text_without_names_stays(packages):
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(rename(tokens, Text(tokens, tokens, ""), seed=1), tokens)


def test_too_few_syllables_are_refused():
    with pytest.raises(ValueError, match="120 syllables are no other tokens, and the tokenizer needs 121"):
        train_tokenizer(["one = two"], vocabulary=400, syllables=121)


def test_training_and_validation_have_no_package_in_common():
    assert not set(package_text.TRAIN) & set(package_text.VALIDATION)
