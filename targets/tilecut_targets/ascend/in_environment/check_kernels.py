"""Import what the kernels need, start the compilers, and answer their versions. Runs inside "ascend-kernels"."""

import importlib
import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

import ascendnpuir
import llvmlite.binding

BINARIES = ("bishengir-compile", "bishengir-compile-a5", "bishengir-opt")

for module in ("numpy", "pybind11", "triton.backends.ascend.compiler"):
    importlib.import_module(module)
llvmlite.binding.initialize_native_target()
versions = {
    name: importlib.metadata.version(name)
    for name in ("triton-ascend", "ascendnpu-ir", "numpy", "pybind11", "llvmlite")
}
for binary in BINARIES:
    path = Path(ascendnpuir.__path__[0]) / "bin" / binary
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    versions[binary] = re.findall(r"\d+\.\d+\.\d+", answer.stdout)[0]
print(json.dumps({"versions": versions}))
