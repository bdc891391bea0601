"""The prompts of benchmarks.rag, and such prompts about other modules for `starling distil --prompts`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import NamedTuple

from examples.stdlib_documents import MODULES, Index, entries, make_documents

MARK = "<|file_sep|>"
CHARACTERS, RETRIEVED = 1000, 6
SHORT, LONG = "instructions", "instructions and two examples"
"""Kinds of heads."""

SYSTEM = """<|im_start|>system
You answer questions about the standard library of Python. The user's message begins with documents. Each of them has \
functions of one module: the name of the function behind the name of its module, the signature with the default values \
of its arguments, and what it does. Some documents have nothing to do with the question; pass over them. The answer is \
in one of the documents: do not answer from memory. Answer with the name of the function and nothing else.<|im_end|>
<|im_start|>user
"""
EXAMPLE = "{0.document}\nQuestion: {0.text}<|im_end|>\n<|im_start|>assistant\n{0.answer}<|im_end|>\n<|im_start|>user\n"

OTHERS = (
    *("argparse", "ast", "asyncio", "atexit", "bdb", "binascii", "bz2", "cProfile", "cmath", "code", "codecs"),
    *("codeop", "collections", "compileall", "contextlib", "contextvars", "csv", "ctypes", "ctypes.util", "curses"),
    *("dataclasses", "dbm", "decimal", "dis", "doctest", "email", "email.charset", "email.encoders", "email.header"),
    *("email.utils", "encodings", "ensurepip", "enum", "faulthandler", "fcntl", "filecmp", "fileinput", "fractions"),
    *("ftplib", "gc", "getopt", "gettext", "grp", "gzip", "hashlib", "hmac", "http.client", "http.cookiejar"),
    *("imaplib", "importlib", "importlib.metadata", "importlib.resources", "importlib.util", "io", "ipaddress"),
    *("itertools", "keyword", "linecache", "logging", "logging.config", "lzma", "marshal", "mimetypes"),
    *("modulefinder", "multiprocessing.connection", "netrc", "numbers", "opcode", "optparse", "os", "pathlib", "pdb"),
    *("pickle", "pickletools", "pkgutil", "platform", "plistlib", "posixpath", "profile", "pstats", "pty", "pwd"),
    *("py_compile", "pyclbr", "pydoc", "quopri", "readline", "reprlib", "resource", "runpy", "sched", "select"),
    *("selectors", "shelve", "signal", "site", "smtplib", "socket", "sqlite3", "ssl", "stat", "string", "stringprep"),
    *("struct", "symtable", "sys", "sysconfig", "syslog", "tabnanny", "tarfile", "termios", "threading", "time"),
    *("token", "tokenize", "trace", "tracemalloc", "tty", "typing", "unicodedata", "unittest", "unittest.mock"),
    *("urllib.parse", "urllib.request", "warnings", "wave", "weakref", "webbrowser", "xml.dom", "xml.dom.minidom"),
    *("xml.etree.ElementTree", "xml.sax", "xml.sax.saxutils", "xmlrpc.client", "zipapp", "zipfile", "zipimport"),
    *("zlib", "zoneinfo"),
)
"""Modules of the standard library that benchmarks.rag does not ask about."""

QUESTIONS = 8
"""Of training prompts with the same documents, at most."""

MODULE_SHARE = 0.8
"""Of the answers behind instructions alone, those that have the module's name too."""


class Question(NamedTuple):
    """A question, the module and the name of the function that is its answer, and the document that has it."""

    text: str
    module: str
    answer: str
    document: str


def make_questions(documents: list[str], modules: Sequence[str] = MODULES) -> Iterator[Question]:
    """Yield a question for each function of the modules whose documentation's first sentence does not name it."""
    for module in modules:
        for entry in entries(module):
            name = re.split(r"[(.]", entry.removeprefix(f"{module}."), maxsplit=1)[0]
            sentence = " ".join(entry.split("\n", 1)[1].split("\n\n")[0].split()).split(". ")[0].rstrip(".")
            document = next((each for each in documents if f"{module}.{name}(" in each), None)
            if document is None or not 20 <= len(sentence) <= 160 or name.lower() in sentence.lower():
                continue
            yield Question(f'Which function of {module} does this? "{sentence}."', module, name, document)


def context_of(kind: str, examples: list[Question], found: list[str]) -> str:
    """Return the text before the question: a head of this kind, and the documents."""
    solved = map(EXAMPLE.format, examples)
    head = SYSTEM + ("".join(solved) if kind == LONG else "")
    return head + "".join(f"{MARK}{document}" for document in found)


def question_of(asked: Question) -> str:
    """Return the text behind the documents."""
    return f"{MARK}\nQuestion: {asked.text}<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(kind: str, examples: list[Question], found: list[str], asked: Question) -> str:
    return context_of(kind, examples, found) + question_of(asked)


def retrieval_questions(index: Index, number: int) -> tuple[list[Question], list[tuple[Question, list[str]]]]:
    """Return two questions to show with their answers, and at most ``number`` others, each with its found documents.

    Questions whose document is not found are left out.

    Args:
        index: index of the documents that are asked about.
    """
    made = list(make_questions(index.documents))
    Random(0).shuffle(made)
    asked = ((each, index.search(each.text, RETRIEVED)) for each in made[2:])
    return made[:2], [*islice(((each, found) for each, found in asked if each.document in found), number)]


def training_prompts(rng: Random) -> Iterator[dict[str, str]]:
    """Yield lines for `starling distil`: {"prompt": text, "answer": text}, about functions of OTHERS.

    All questions that a prompt's documents answer are asked, up to QUESTIONS, a line each. The answer is written as the
    model writes it: behind the name of the module, or as in the answered questions.
    """
    documents = make_documents(CHARACTERS, OTHERS)
    index = Index(documents)
    made = list(make_questions(documents, OTHERS))
    rng.shuffle(made)
    for first in made:
        found = index.search(first.text, RETRIEVED)
        if first.document not in found:
            continue
        others = [each for each in made if each.document in found and each != first]
        examples = rng.sample([each for each in made if each.document not in found], 2)
        if rng.random() < 0.5:
            rng.shuffle(found)
        kind = rng.choice((SHORT, LONG))
        context = context_of(kind, examples, found)
        for asked in [first, *others][:QUESTIONS]:
            yield {"prompt": context + question_of(asked), "answer": answer_of(asked, kind, rng)}


def answer_of(asked: Question, kind: str, rng: Random) -> str:
    """Return the name, as the model writes it."""
    return asked.answer if kind == LONG or rng.random() > MODULE_SHARE else f"{asked.module}.{asked.answer}"
