"""Documents from the documentation of the standard library, and a TF-IDF index that finds the best for a question."""

import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

MODULES = (
    *("base64", "bisect", "calendar", "colorsys", "copy", "difflib", "fnmatch", "functools", "getpass", "glob"),
    *("heapq", "html", "inspect", "json", "locale", "math", "operator", "pprint", "random", "re", "secrets", "shlex"),
    *("shutil", "statistics", "subprocess", "tempfile", "textwrap", "timeit", "traceback", "types", "uuid"),
)


def entries(module: str) -> Iterator[str]:
    """Yield the functions of a module: name, signature and documentation."""
    members = vars(importlib.import_module(module))
    for name, member in sorted(members.items()):
        documentation = inspect.getdoc(member)
        if name.startswith("_") or not inspect.isroutine(member) or not documentation:
            continue
        if (member.__module__ or module).removeprefix("_") != module:  # imported from another module
            continue
        try:
            signature = re.sub(r" at 0x\w+", "", str(inspect.signature(member)))  # of defaults without a name
        except ValueError:  # some functions written in C have none
            signature = "(...)"
        yield f"{module}.{name}{signature}\n{documentation}\n"


def make_documents(characters: int, modules: Sequence[str] = MODULES) -> list[str]:
    """Make the documents: as many functions of one module as have about ``characters`` characters."""
    documents = []
    for module in modules:
        document = ""
        for entry in entries(module):
            if document and len(document) + len(entry) > characters:
                documents.append(document)
                document = ""
            document += entry[:characters]
        if document:  # some modules have no functions of their own
            documents.append(document)
    return documents


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


class Index:
    """A TF-IDF index: cosine similarity of word counts, weighted by how few documents have the word."""

    def __init__(self, documents: list[str]) -> None:
        self.documents = documents
        occurrences = Counter(word for document in documents for word in set(words(document)))
        self.weights = {word: math.log(len(documents) / number) for word, number in occurrences.items()}
        self.vectors = [self.vector(document) for document in documents]

    def vector(self, text: str) -> dict[str, float]:
        counts = Counter(word for word in words(text) if word in self.weights)
        values = {word: (1 + math.log(count)) * self.weights[word] for word, count in counts.items()}
        norm = math.sqrt(sum(value * value for value in values.values()))
        return {word: value / norm for word, value in values.items()} if norm else {}

    def search(self, question: str, number: int) -> list[str]:
        """Return the best documents, the best one last: near the question."""
        query = self.vector(question)
        scores = [sum(value * vector.get(word, 0.0) for word, value in query.items()) for vector in self.vectors]
        best = sorted(range(len(scores)), key=scores.__getitem__)[-number:]
        return [self.documents[index] for index in best]
