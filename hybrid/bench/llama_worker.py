"""Runs llama.cpp in a process of its own: evaluates tokens on request, answers with the seconds.

Started by :mod:`hybrid.bench.peers` as ``python -m hybrid.bench.llama_worker GGUF THREADS
CONTEXT``; one JSON request ``{"prompt": P, "generate": N, "again": false}`` a line on stdin, one
JSON answer a line on stdout. With ``again`` the prompt is not computed anew where it is the
same as in the last request: what followed it is forgotten.
"""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama


def main() -> None:
    """Load, say so, then serve requests until stdin ends."""
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    start = time.perf_counter()
    model = Llama(
        path,
        n_ctx=context,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    held = 0
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if request["again"] and held == request["prompt"]:
            model.n_tokens = held
        else:
            model.reset()
            held = request["prompt"]
            model.eval([(7 * i + 11) % model.n_vocab() for i in range(held)])
        prefilled = time.perf_counter()
        for i in range(request["generate"]):
            model.eval([(13 * i + 5) % model.n_vocab()])
        done = time.perf_counter()
        answer = {"prefill_s": prefilled - start, "decode_s": done - prefilled}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
