"""The text from installed packages: what its tokens stand for, on which bits per byte rest."""

from __future__ import annotations

import torch

from examples import package_text
from examples.package_text import (
    encode,
    marked,
    names_in,
    rename,
    token_bytes,
    train_tokenizer,
)
from examples.stdlib_text import Text

SOURCE = """class Thing(Base):
    pass

def go(self, n: int=31) -> str:
    return f'{n}' + '' + str('', 100000.0)"""


def test_the_tokens_of_renamed_windows_are_a_text_with_other_names():
    texts = [SOURCE, "first = second(third)\nfirst(é漢, ' \t\x00')"] * 3
    tokenizer, names = train_tokenizer(texts, vocabulary=300, syllables=30), {}
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 0
    stream = encode(texts, tokenizer, names)
    assert (stream == 0).sum() == len(texts) and (stream >= 300).sum() == sum(len(names_in(text)) for text in texts)
    text = Text(stream, stream, "", token_bytes(tokenizer), tokenizer, syllables=30)
    end = (stream == 0).nonzero()[0].item()
    longer = torch.cat([stream[:end].long(), torch.zeros(2 * len(names_in(SOURCE)), dtype=torch.int64)])
    rows = longer.expand(3, -1)
    renamed = rename(rows, text, seed=1)
    assert renamed.shape == rows.shape and renamed.dtype == rows.dtype and renamed.max() < 300
    for row in renamed:
        decoded = tokenizer.decode(row)
        assert text.token_bytes[row].sum() == len(decoded.encode())
        assert marked(decoded) == marked(SOURCE)
        one_to_one = set(zip(names_in(SOURCE), names_in(decoded), strict=True))
        assert len(one_to_one) == len(dict(one_to_one)) == len({new for _, new in one_to_one}) == 4
        assert all(len(new) == 2 * package_text.NAME_TOKENS for _, new in one_to_one)
    assert len({tuple(names_in(tokenizer.decode(row))) for row in renamed}) > 1


def test_training_and_validation_have_no_package_in_common():
    assert not set(package_text.TRAIN) & set(package_text.VALIDATION)
