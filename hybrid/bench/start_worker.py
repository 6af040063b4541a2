"""Starts a model in a process of its own and times each stage up to its first text.

Started by :mod:`hybrid.bench.model` as ``python -m hybrid.bench.start_worker MODEL DTYPE THREADS
PROMPT GENERATE``; prints one line of JSON.
"""

from __future__ import annotations

import time

BORN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402

import psutil  # noqa: E402

#: Seconds between two looks at the memory.
_LOOK_S = 0.01


class Memory(threading.Thread):
    """Looks at this process' memory that no file backs; ``most_bytes`` is the most seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_bytes = 0
        self._process, self._done = psutil.Process(), threading.Event()

    def run(self) -> None:
        """Look until :meth:`end`."""
        while not self._done.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Take what is in use now into account."""
        info = self._process.memory_info()
        self.most_bytes = max(self.most_bytes, int(info.rss - getattr(info, "shared", 0)))

    def end(self) -> int:
        """Stop looking and return the most that was seen."""
        self._done.set()
        self.join()
        self.look()
        return self.most_bytes


def main() -> None:
    """Import, load, generate a token, then a text, and print what it took."""
    (model_path, dtype), numbers = sys.argv[1:3], sys.argv[3:6]
    threads, prompt, generate = map(int, numbers)
    memory = Memory()
    memory.start()
    from hybrid.bench.model import generate_once
    from hybrid.loading import load_fast_model, set_threads

    imported = time.perf_counter()
    memory.look()
    before_bytes = memory.most_bytes
    set_threads(threads)
    model, _ = load_fast_model(model_path, dtype=dtype)
    loaded = time.perf_counter()
    began, ttft_s, _ = generate_once(model, 1, 2)
    first = began + ttft_s
    generate_once(model, prompt, generate)
    found = {
        "import_s": imported - BORN,
        "load_s": loaded - imported,
        "load_to_first_token_s": first - imported,
        "process_to_first_token_s": first - BORN,
        "anonymous_before_loading_bytes": before_bytes,
        "peak_anonymous_bytes": memory.end(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
