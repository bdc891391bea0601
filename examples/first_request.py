from pathlib import Path

from openai import OpenAI

chat = OpenAI(base_url="http://localhost:8000/v1", api_key="none").chat.completions.with_raw_response
pages = [Path(f"docs/{name}.md").read_text()[:4000] for name in ("plan", "library", "errors")]
for order in pages, pages[::-1]:
    messages = [{"role": "user", "content": text} for text in ("Use these pages.", *order, "Where do KV pages go?")]
    reply = chat.create(model="smollm2-135m-instruct", messages=messages, max_tokens=20, temperature=0)
    print(reply.elapsed, reply.headers["x-starling-plan"], reply.parse().choices[0].message.content)
