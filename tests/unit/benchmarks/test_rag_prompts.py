"""Training prompts of retrieval ask nothing that the benchmark asks."""

from __future__ import annotations

from itertools import islice
from random import Random

from benchmarks.rag_prompts import CHARACTERS, MARK, OTHERS, QUESTIONS, RETRIEVED, make_questions, training_prompts
from examples.stdlib_documents import MODULES, make_documents


def test_training_prompts_are_of_other_documents_and_questions():
    lines = [*islice(training_prompts(Random(0)), 40)]
    assert lines == [*islice(training_prompts(Random(0)), 40)]
    documents = make_documents(CHARACTERS)
    of_benchmark = {asked.text for asked in make_questions(documents)} | set(documents)
    contexts: dict[str, int] = {}
    for line in lines:
        context, _, question = line["prompt"].rpartition(MARK)
        pieces = context.split(MARK)[-RETRIEVED:]
        asked = question.removeprefix("\nQuestion: ").partition("<|im_end|>")[0]
        assert not {asked, *pieces} & of_benchmark
        assert any(f"{line['answer'].rpartition('.')[2]}(" in piece for piece in pieces)
        contexts[context] = contexts.get(context, 0) + 1
    assert max(contexts.values()) == QUESTIONS
    assert not set(MODULES) & set(OTHERS)
