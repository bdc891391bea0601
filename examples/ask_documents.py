import inspect
import json
import queue
import shlex
import textwrap
import time

from openai import OpenAI

HEAD = (
    "You answer questions about files of Python's standard library, in one short sentence, with words of the files. "
    "Where the files do not have the answer, say so."
)
client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
for modules in (queue, shlex, textwrap), (textwrap, queue, shlex):
    texts = [HEAD, *map(inspect.getsource, modules), "Which class splits text like a shell?"]
    messages = [{"role": "user" if number else "system", "content": text[:4000]} for number, text in enumerate(texts)]
    start = time.monotonic()
    reply = client.chat.completions.with_raw_response.create(
        model="smollm2-135m-instruct", messages=messages, max_tokens=20, temperature=0
    )
    plan = json.loads(reply.headers["x-starling-plan"])
    print(f"{time.monotonic() - start:.1f} s", plan.get("document_sources"), reply.parse().choices[0].message.content)
