"""Questions about the standard library, answered from documents that a TF-IDF score finds in its documentation.

python examples/rag.py

The documents are the functions of some modules, each with its signature and docstring. The best ones for a question
stand in its prompt, the best one last. A document that other questions had stands elsewhere now, beside others: vLLM's
prefix cache does not find it, and with star_segments its KV is reused. The example prints for each question the
tokens computed, the time to the first token, and the answer, with a + if it has the expected word. Dense prompts and
star_segments, and each run, have a cache salt of their own, so they start cold.

The example needs a server of `starling serve`, such as `make serve`. Tokens computed are known of one with
--star-segments, as a preset has it, or --enable-prompt-tokens-details.
"""

import argparse
import re
import uuid

import httpx
from completions import Answer, Completions
from openai import OpenAIError
from stdlib_documents import Index, make_documents

QUESTIONS = (
    ("Which function of shutil copies a directory tree recursively?", "copytree"),
    ("Which function of shutil deletes a directory tree?", "rmtree"),
    ("Which function of shutil creates an archive of a directory?", "make_archive"),
    ("Which function of shutil copies a file with its metadata?", "copy2"),
    ("Which function of textwrap removes common leading whitespace from every line of a text?", "dedent"),
    ("Which function of textwrap adds a prefix to the lines of a text?", "indent"),
    ("What is the default width of textwrap.wrap?", "70"),
    ("Which function of heapq finds the n smallest elements of a dataset?", "nsmallest"),
    ("Which function of heapq transforms a list into a heap?", "heapify"),
    ("Which function of shutil unpacks an archive?", "unpack_archive"),
)
SYSTEM = """<|im_start|>system
You answer questions about the standard library of Python. The user's message begins with documents. Each of them has \
functions of one module: the name of the function behind the name of its module, the signature with the default values \
of its arguments, and what it does. Some documents have nothing to do with the question; pass over them. The answer is \
in one of the documents: do not answer from memory. If you are asked for a function, answer with its name. If you are \
asked for a default value, find the argument in the signature of the function, and answer with the value behind the \
equals sign. Answer with one short sentence and nothing else. Do not repeat the question, do not explain the answer, \
and do not write code.<|im_end|>
<|im_start|>user
"""
CONFIGURATIONS = ("dense", "block")


def show(name: str, answer: Answer, right: bool) -> str:
    computed = "?" if answer.computed is None else answer.computed
    text = " ".join(answer.text.split())
    return f"  {name}{computed:>6} of {answer.prompt_tokens} tokens, {answer.seconds:5.2f} s {'-+'[right]} {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    parser.add_argument("--mark", default="<file_sep>", help="first token of each document (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=10, help="number of questions (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=6, help="documents in a prompt (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=1000, help="maximum of a document (default: %(default)s)")
    args = parser.parse_args()
    index, run = Index(make_documents(args.characters)), uuid.uuid4()
    answers: dict[str, list[tuple[Answer, bool]]] = {name: [] for name in CONFIGURATIONS}
    try:
        client = Completions(args.url)
        for question, expected in QUESTIONS[: args.questions]:
            found = index.search(question, args.documents)
            end = f"\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n"
            prompt = SYSTEM + "".join(f"{args.mark}{document}" for document in found) + end
            star = {"star": "on", "star_query_tokens": len(client.tokenize(end))}
            options = {
                "dense": {"star": "off"},
                "block": star | {"star_segments": args.mark},
            }
            print(f"{question} ({expected})")
            for name, chosen in options.items():
                answer = client.ask(prompt, chosen, max_tokens=24, stop=["\n"], cache_salt=f"{run} {name}")
                right = re.search(rf"\b{re.escape(expected)}\b", answer.text) is not None
                answers[name].append((answer, right))
                print(show(name, answer, right), flush=True)
    except (OpenAIError, httpx.HTTPError) as error:
        raise SystemExit(str(error)) from None
    for name, given in answers.items():
        computed = [answer.computed for answer, _ in given]
        tokens = "?" if None in computed else sum(computed)
        prompts = sum(answer.prompt_tokens for answer, _ in given)
        seconds = sum(answer.seconds for answer, _ in given)
        right = sum(right for _, right in given)
        print(f"{name}{tokens:>6} of {prompts} tokens, {seconds:.1f} s, {right} of {len(given)} right")


if __name__ == "__main__":
    main()
