"""A session of a coding agent, whose files and tool results change: what each turn computes, and how long it takes.

python examples/agent_session.py

Each turn of the session changes its prompt: a file in the middle is edited and grows, a file is added, a tool's output
is added or cleared, and in one turn a summary replaces the older conversation. The same prompts are sent dense, with
vLLM's prefix cache; with Star Attention; and with star_segments, where each file, tool's output and message is a
document that is reused wherever it stands. Each of these, and each run, has a cache salt of its own, so it starts cold.
The answers in the conversation are written here, not the model's, so that all three get the same prompts.

The example needs a server of `starling serve`, such as `make serve`. Tokens computed are known of one with
--star-segments, as a preset has it, or --enable-prompt-tokens-details.
"""

import argparse
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
from completions import Answer, Completions
from openai import OpenAIError

SYSTEM = """You are a careful programming assistant in a terminal. You work on the files of a Python project, which \
are given below, each after its name. Behind them are the outputs of commands and the conversation so far. Rules: read \
a file before you change it. Keep changes small, and say in a sentence why each of them is needed. Follow the style of \
the file, with type annotations where the file has them. Do not add dependencies. Do not change public names without \
being asked to. When a test fails, find the cause before you change the test. When something is unclear, ask one short \
question. Answer in plain text, in at most three sentences, and name the file and the function that you mean. If the \
files do not have the answer, say so instead of guessing. Do not repeat the question, and do not write down a file."""
SUMMARY = (
    "Summary of the conversation so far: the user asked about the files above, some were edited and the tests pass."
)
OUTPUT, EDIT, CLEARED = "a tool's output is added", "a file is edited", "the oldest output is cleared"
FILE, COMPACTION = "a file is added", "the conversation is compacted"
EVENTS = (OUTPUT, EDIT, "a question", OUTPUT, CLEARED, FILE)
PROMPT = "$ "  # of a shell, which starts each output of a tool
CONFIGURATIONS = ("dense", "star", "block")


def message(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


class Session:
    """The prompts of a session. Its texts are sources of the standard library.

    Attributes:
        files: name -> text.
        log: outputs of tools and earlier messages, in the order in which they came.
    """

    def __init__(self, mark: str, num_files: int, characters: int) -> None:
        self.mark, self.characters = mark, characters
        self.sources = iter(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")))
        self.files: dict[str, str] = {}
        self.log: list[str] = []
        for _ in range(num_files):
            self.add_file()

    def add_file(self) -> None:
        path = next(self.sources)
        self.files[path.name] = path.read_text()[: self.characters]

    def change(self, turn: int, event: str) -> None:
        """Let an event happen, and the prompt change."""
        if event == COMPACTION:
            self.log = [SUMMARY, *self.log[-4:]]
        elif event == FILE:
            self.add_file()
        elif event == EDIT:
            name = list(self.files)[len(self.files) // 2]
            half = len(self.files[name]) // 2
            self.files[name] = f"{self.files[name][:half]}\n# Edited in turn {turn}.\n{self.files[name][half:]}"
        elif event == OUTPUT:
            path = next(self.sources)
            lines = path.read_text()[: self.characters].splitlines()
            numbered = (f"{number}: {line}" for number, line in enumerate(lines, 1))
            self.log.append(f"{PROMPT}grep -n '' {path.name}\n" + "\n".join(numbered))
        elif event == CLEARED:
            oldest = next(index for index, text in enumerate(self.log) if text.startswith(PROMPT))
            self.log[oldest] = "The output of this command was cleared."

    def prompts(self, turns: int) -> Iterator[tuple[str, str, str]]:
        """Yield (event, prompt without its end, end of the prompt: the user's message) of each turn."""
        for turn in range(1, turns + 1):
            event = "the first prompt" if turn == 1 else EVENTS[(turn - 2) % len(EVENTS)]
            if turn == turns // 2 // len(EVENTS) * len(EVENTS) + 4:  # one of the turns with a question alone
                event = COMPACTION
            self.change(turn, event)
            segments = [*(f"{name}\n{text}\n" for name, text in self.files.items()), *self.log]
            context = message("system", SYSTEM) + "".join(f"{self.mark}{segment}" for segment in segments)
            question = message("user", f"Turn {turn}. What should I look at next, and in which file?")
            # The mark in front of the question: the next prompt has it there, and dense then finds the question cached.
            yield event, context, f"{self.mark}{question}<|im_start|>assistant\n"
            self.log.append(question + message("assistant", f"Look at the file number {turn % len(self.files)}."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    parser.add_argument("--mark", default="<file_sep>", help="first token of each document (default: %(default)s)")
    parser.add_argument("--block", type=int, default=512, help="tokens of star's blocks (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=30, help="turns of the session (default: %(default)s)")
    parser.add_argument("--files", type=int, default=6, help="files at the start (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=1000, help="maximum of a file (default: %(default)s)")
    args = parser.parse_args()
    session, run = Session(args.mark, args.files, args.characters), uuid.uuid4()
    answers: dict[str, list[Answer]] = {name: [] for name in CONFIGURATIONS}
    try:
        client = Completions(args.url)
        print(f"{'tokens computed, seconds to the first token':48}" + "".join(f"{name:>16}" for name in CONFIGURATIONS))
        for turn, (event, context, end) in enumerate(session.prompts(args.turns), 1):
            query = {"star": "on", "star_query_tokens": len(client.tokenize(end))}
            options = {
                "dense": {"star": "off"},
                "star": query | {"star_block_size": args.block, "star_overlap_size": 0},
                "block": query | {"star_segments": args.mark},
            }
            for name, star in options.items():
                answers[name].append(client.ask(context + end, star, max_tokens=1, cache_salt=f"{run} {name}"))
            last = [answers[name][-1] for name in CONFIGURATIONS]
            print(f"{turn:2} {event:31}{last[0].prompt_tokens:7} tokens {''.join(map(show, last))}", flush=True)
    except (OpenAIError, httpx.HTTPError) as error:
        raise SystemExit(str(error)) from None
    prompt_tokens = sum(answer.prompt_tokens for answer in answers["dense"])
    print(f"{'all turns':34}{prompt_tokens:7} tokens {''.join(map(total, answers.values()))}")
    print(f"anchor with star_segments: {answers['block'][0].plan['anchor_size']} tokens")


def show(answer: Answer) -> str:
    return f"{'?' if answer.computed is None else answer.computed:>8}{answer.seconds:6.2f} s"


def total(answers: list[Answer]) -> str:
    computed = [answer.computed for answer in answers]
    tokens = "?" if None in computed else sum(computed)
    return f"{tokens:>8}{sum(answer.seconds for answer in answers):6.1f} s"


if __name__ == "__main__":
    main()
