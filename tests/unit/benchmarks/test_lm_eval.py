"""The task of documents that lm_eval runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.lm_eval import RETRIEVAL, RETRIEVAL_TASK, write_retrieval
from benchmarks.rag_prompts import MARK, RETRIEVED


def test_its_prompts_have_documents_and_an_answer_among_them(tmp_path):
    write_retrieval(tmp_path, 3)
    task = json.loads((tmp_path / f"{RETRIEVAL}.yaml").read_text())
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
    prompts = [*map(json.loads, lines)]
    assert len(prompts) == 3
    for prompt in prompts:
        *_, question = documents = prompt[task["doc_to_text"]].split(MARK)[1:]
        assert len(documents) == RETRIEVED + 1 and question.startswith("\nQuestion: ")
        assert any(f"{prompt[task['doc_to_target']]}(" in document for document in documents)


def test_the_last_name_of_an_answer_counts():
    pattern = RETRIEVAL_TASK["filter_list"][0]["filter"][0]["regex_pattern"]
    assert [re.findall(pattern, text)[0] for text in ("heappush", "heapq.heappush", " heappush().")] == ["heappush"] * 3
