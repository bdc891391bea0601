"""A llama.cpp model in a process of its own, which the benchmark times.

Run as a script by a Python that has llama-cpp-python and nothing of Starling. It reads requests and writes responses,
each as a line of JSON.
"""

import json
import os
import sys
import time


def main() -> None:
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other prints to standard output must not mix with the responses
    job = json.loads(sys.argv[1])
    os.sched_setaffinity(0, job["cpus"])
    import llama_cpp

    threads = len(job["cpus"])
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=job["context"],
        n_batch=job["batch"],
        n_ubatch=job["micro_batch"],
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=job["flash_attention"],
        verbose=False,
    )
    ready = {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
        "model": model.metadata.get("general.name"),
    }
    print(json.dumps(ready), file=responses, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model.reset()
        start = time.perf_counter()
        model.eval(request["ids"])
        tokens = [model.sample(temp=0)]
        first = time.perf_counter()
        while len(tokens) < request["max_tokens"]:
            model.eval(tokens[-1:])
            tokens.append(model.sample(temp=0))
        response = {
            "first_token_seconds": first - start,
            "seconds": time.perf_counter() - start,
            "token_ids": tokens,
        }
        print(json.dumps(response), file=responses, flush=True)


if __name__ == "__main__":
    main()
