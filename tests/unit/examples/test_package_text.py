"""The text from installed packages: which files it has, and what its tokens stand for."""

from __future__ import annotations

import sysconfig

import pytest
import torch

from examples import package_text
from examples.package_text import encode, read_packages, token_bytes, train_tokenizer


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})

    def lines(name: str, count: int = 30) -> str:
        return "".join(f"def function_{name}_{i}(argument): return argument\n" for i in range(count))

    files = {
        "one/b.py": lines("b"),
        "one/a.py": lines("a"),
        "one/part/copy.py": lines("a", 20) + lines("new", 10),  # mostly lines that occurred before
        "one/part/other.py": lines("a", 10) + lines("other", 20),
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


def test_the_bytes_of_the_tokens_are_those_of_the_text(packages):
    texts = [*packages.values(), "é漢👩 \x00 \r\n\t" * 9]
    tokenizer = train_tokenizer(texts, vocabulary=300)
    assert len(tokenizer) == 300
    stream = encode(texts, tokenizer)
    sizes = token_bytes(tokenizer)
    assert sizes[stream.int()].sum() == sum(len(text.encode()) for text in texts) + len(texts)
    assert (stream == tokenizer.eos_token_id).sum() == len(texts)
    assert tokenizer.decode(encode(texts[-1:], tokenizer)[:-1]) == texts[-1]
    assert tokenizer.eos_token_id == 0  # the recall task leaves it out
    assert torch.equal(stream, encode(texts, train_tokenizer(texts, vocabulary=300)))


def test_training_and_validation_have_no_package_in_common():
    assert not set(package_text.TRAIN) & set(package_text.VALIDATION)
