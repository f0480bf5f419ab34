"""onnxruntime-genai on a Hugging Face folder, in the environment that holds it: build a model, then time it when asked.

    python genai_worker.py MODEL OUTPUT fp32|int4

Prints "ready", or "failed: why". Then, for every line "<tokens> <steps>" on stdin, the CPU milliseconds of prefilling so many
tokens and the median of so many steps after them, on one thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def build(model: str, output: str, precision: str) -> str | None:
    """Run the package's own builder, unless it has run; why it failed, or None."""
    if (Path(output) / "genai_config.json").is_file():
        return None
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", model, "-o", output, "-p", precision, "-e", "cpu", "-c", f"{output}-cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    path = Path(output) / "genai_config.json"
    held = json.loads(path.read_text())
    held["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    path.write_text(json.dumps(held))
    return None


def main() -> None:
    """Build, then answer."""
    why = build(*sys.argv[1:4])
    if why is not None:
        print(f"failed: {why}", flush=True)
        return
    import numpy as np
    import onnxruntime_genai as genai  # type: ignore[import-not-found]

    model = genai.Model(sys.argv[2])
    print("ready", flush=True)
    for line in sys.stdin:
        tokens, steps = map(int, line.split())
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=tokens + steps + 2, min_length=tokens + steps + 2, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.process_time()
        generator.append_tokens(np.arange(3, 3 + tokens, dtype=np.int32)[None])
        generator.generate_next_token()
        prefill, times = time.process_time() - start, []
        for _ in range(steps):
            start = time.process_time()
            generator.generate_next_token()
            times.append(time.process_time() - start)
        print(prefill * 1e3, statistics.median(times) * 1e3, flush=True)


main()
