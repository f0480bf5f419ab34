"""An artifact that generates, in a process of its own: timed when asked, as `genai_worker.py` is.

    python decode_worker.py ARTIFACT

Prints "ready". Then, for every line "<tokens> <steps>" on stdin, the CPU milliseconds of prefilling so many tokens and the
median of so many steps after them, on one thread: what `Session.generate` runs, without choosing tokens.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from tilecut_runtime.session import load


def main() -> None:
    """Open, then answer."""
    decoder = load(sys.argv[1], threads=1).decoder
    print("ready", flush=True)
    for line in sys.stdin:
        tokens, steps = map(int, line.split())
        decoding = decoder.start(1, tokens + steps)
        prompt, lengths, one = np.arange(3, 3 + tokens)[None], np.array([tokens]), np.ones(1, np.int64)
        start = time.process_time()
        decoding.step(prompt, lengths)
        prefill, times = time.process_time() - start, []
        decoding.accept(lengths)
        for i in range(steps):
            start = time.process_time()
            decoding.step(prompt[:, i : i + 1], one)
            times.append(time.process_time() - start)
            decoding.accept(one)
        print(f"{prefill * 1e3} {statistics.median(times) * 1e3}", flush=True)


if __name__ == "__main__":
    main()
