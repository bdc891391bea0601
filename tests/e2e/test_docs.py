"""The code of the documentation's pages, run as it stands there, against a server as docs/clients.md starts it.

The program of the quick start has a server as docs/quickstart.md starts it.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from examples.server import serving
from tests.forks import run_in_fork
from tests.pages import fences, servers
from tests.parity.harness import OF_ENGINES

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
QUICK_START = "docs/quickstart.md"
MODEL = "models/smollm2-135m-instruct"
ON_A_GPU = "docs/gpu-results.md"  # its program reads nvidia-smi
PAGES = ["README.md", *sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {ON_A_GPU})]
NOT_INSTALLED = ("langchain_openai", "llama_index")  # in no environment of the project; run by hand
GIVEN = {  # what a page leaves to its reader
    "README.md": f"import os\nos.chdir({str(ROOT)!r})\n",
    "docs/documents.md": 'head, documents, question = "Read.\\n", ["A dog barks. " * 60, "A cat. " * 99], "Who?"\n',
}


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        printed: the block that follows it without an information string: what it prints; None: there is none.
    """

    page: str
    number: int
    code: str
    printed: str | None

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks(page: str, language: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, number, one.content, after.content if after is not None and not after.info else None)
        for number, (one, after) in enumerate(pairwise([*fences(text), None]))
        if one.info == language
    ]


PYTHON = [block for page in PAGES for block in blocks(page, "python")]
OF_CLIENTS = [block for block in PYTHON if "LLM(" not in block.code or "langchain" in block.code]
OF_ENGINE = [block for block in PYTHON if block not in OF_CLIENTS]


def check_printed(block: Block, output: str) -> None:
    """Hold what a block prints of a plan against the page; what the model answers depends on the processor."""
    expected = ["8 blocks of 128"] if block.page == "docs/clients.md" else []
    assert re.findall(r"\d+ blocks of \d+", output) == expected
    assert block.printed is None or all(line in block.printed for line in expected)


@pytest.fixture(scope="module")
def server(forked, tmp_path_factory):
    """As the page starts it, with a library, which another page's code fills."""
    folder = tmp_path_factory.mktemp("docs")
    (command,) = servers(CLIENTS)
    model, _, _, *options = shlex.split(command)
    assert model == MODEL
    options += ["--star-library", f"{folder / 'library'}:1GiB"]
    with serving(ROOT / model, *options, log=folder / "log") as server:
        yield server


def addressed(server, code: str) -> str:
    """The code with the server's own ports, which other programs may have taken."""
    return re.sub(r"(localhost|127\.0\.0\.1):50051", server.grpc, re.sub(r"http://localhost:8000", server.http, code))


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("block", OF_CLIENTS, ids=str)
def test_python_of_clients(server, tmp_path, block):
    missing = [name for name in NOT_INSTALLED if name in block.code and importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    output = run(sys.executable, "-c", GIVEN.get(block.page, "") + addressed(server, block.code), folder=tmp_path)
    check_printed(block, output)
    if "print(" in block.code:
        assert output.strip()


def test_the_first_answer_of_the_quick_start_and_the_first_request_of_the_readme(forked, tmp_path):
    """With a server as the pages start it, the second prompt finds the documents of the first in another order."""
    model, *options = shlex.split(servers((ROOT / QUICK_START).read_text(encoding="utf-8"))[0])
    code = (ROOT / "examples" / "ask_documents.py").read_text(encoding="utf-8")
    with serving(ROOT / model, *options, log=tmp_path / "log") as server:
        output = run(sys.executable, "-c", addressed(server, code), folder=tmp_path)
        request = (ROOT / "examples" / "first_request.py").read_text(encoding="utf-8")
        requested = run(sys.executable, "-c", addressed(server, request), folder=ROOT)
    printed = re.findall(r"^[\d.]+ s (\[\{.*?\}\])", output, re.MULTILINE)
    first, second = (json.loads(sources.replace("'", '"')) for sources in printed)
    assert [{*sources} for sources in first] == [{"computed"}] * 3
    assert [{*sources} for sources in second] == [{"memory"}] * 3
    assert sorted(of["memory"] for of in second) == sorted(of["computed"] for of in first)
    plans = [json.loads(plan) for plan in re.findall(r"^[\d:.]+ (\{.*\}) ", requested, re.MULTILINE)]
    kinds = [[kind for of in plan["document_sources"] for kind in of] for plan in plans]
    assert kinds == [4 * ["computed"], 4 * ["memory"]], "the first message and three documents"


def run_engine(folder: Path, code: str) -> str:
    """Run a program with an engine of its own; returns what it prints."""
    file, model = folder / "program.py", str(ROOT / MODEL)
    file.write_text(code.replace(MODEL, model))
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = run_in_fork("tests.e2e.docs_job:main", str(file), imports=OF_ENGINES, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("block", OF_ENGINE, ids=str)
def test_python_with_an_engine_of_its_own(tmp_path, block):
    check_printed(block, run_engine(tmp_path, block.code))


def test_notebook(tmp_path):
    """All cells, with less text."""
    cells = json.loads((ROOT / "examples" / "five_minutes.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    modules = re.search(r"^modules = .*$", code, re.MULTILINE)
    assert modules is not None
    code = code.replace(modules[0], 'modules = ("getpass", "bisect", "glob")')
    *answers, refused, shown = run_engine(tmp_path, f"{code}\nprint(answers)").splitlines()[-6:]
    assert [line.split()[0] for line in answers] == ["dense", "careful", "balanced", "blocks"]
    assert refused.startswith("star_block_size=100 is refused")
    assert "'attention': 'star'" in shown.rpartition("'blocks of 512'")[2]


def test_curl(server, tmp_path):
    """The page's commands, one after the other, in one folder."""
    (block,) = (block for block in blocks("docs/clients.md", "console") if "curl" in block.code)
    script = re.sub(r"^\$ ", "", block.code, flags=re.MULTILINE).replace("python3", shlex.quote(sys.executable))
    script = script.replace("localhost:8000", server.http.removeprefix("http://"))
    output = run("bash", "-ec", script, folder=tmp_path)
    assert block.printed is not None
    (header,) = re.findall(r"x-starling-plan: (.*),", block.printed)
    assert f"x-starling-plan: {header}" in output


def test_pages_have_code_that_runs():
    assert {block.page for block in PYTHON} >= {"docs/clients.md", "docs/grpc.md", QUICK_START, *GIVEN}
    assert [block.page for block in OF_ENGINE] == ["docs/clients.md", QUICK_START]
