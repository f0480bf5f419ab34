"""Lower a Triton kernel with triton-ascend and plan it with bishengir-compile. Runs inside "ascend-kernels".

Asked: {"source": file, "kernel": function, "signature": {argument: type}, "constants": {argument: value},
"chip": "Ascend910B3", "family": "a2" | "a3" | "a950", "folder": where to write, "options": [of bishengir-compile]}.
Writes kernel.ttir, kernel.ttadapter.mlir (linalg) and, where planning succeeds, kernel.hivm.mlir. Answers
{"kernel_name", "mix_mode", "planned": bool, "messages": [lines of the compiler]}.

triton-ascend has no compile without a device; these are the stages of its `AscendBackend.add_stages`, called one by one.
bishengir-compile hands what it planned to `hivmc` of CANN; where that is missing it fails after all its own work, so the
HIVM file that it saved is what counts, not its exit code.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import ascendnpuir
from triton._C.libtriton import ir
from triton.backends.ascend import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

# What triton-ascend sets for the 950 family when it finds one.
A5 = {
    "compile_on_910_95": True,
    "multibuffer": False,
    "enable_auto_bind_sub_block": False,
    "enable_select_analysis": True,
}


def lower(asked: dict) -> dict:
    """Write TTIR and linalg MLIR."""
    spec = importlib.util.spec_from_file_location("kernel", asked["source"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, asked["kernel"])

    target = GPUTarget("npu", asked["chip"], 0)
    backend = compiler.AscendBackend(target)
    options = backend.parse_options(A5 if asked["family"] == "a950" else {})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature=asked["signature"], constants=asked["constants"])
    code = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {**options.__dict__, "target": target, "hash": asked["kernel"]}
    code = compiler.make_ttir(code, metadata, options)
    folder = Path(asked["folder"])
    # Its locations name files of this machine.
    (folder / "kernel.ttir").write_text(re.sub(r'loc\("[^"]*/', 'loc("', str(code)))
    linalg, metadata = compiler._parse_linalg_metadata(
        compiler.ttir_to_linalg(code, metadata, options, named_ops=True), metadata
    )
    (folder / "kernel.ttadapter.mlir").write_text(linalg)
    return {"mix_mode": metadata["mix_mode"], "kernel_name": metadata["kernel_name"]}


def plan(asked: dict) -> dict:
    """Write the memory-planned HIVM MLIR, where the tile fits."""
    folder = Path(asked["folder"])
    compiler_name = "bishengir-compile-a5" if asked["family"] == "a950" else "bishengir-compile"
    with tempfile.TemporaryDirectory() as saved:
        command = [Path(ascendnpuir.__path__[0]) / "bin" / compiler_name, "kernel.ttadapter.mlir", *asked["options"]]
        command += [f"--save-temps={saved}", "-o", f"{saved}/kernel"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        plan = Path(saved) / "module.hivm.opt.mlir"
        planned = plan.is_file()
        if planned:
            (folder / "kernel.hivm.mlir").write_bytes(plan.read_bytes())
    # Without hivmc these are said of every kernel.
    expected = ("hivmc", "Failed to run BiShengIR pipeline")
    lines = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
    return {"planned": planned, "messages": [line for line in lines if not any(text in line for text in expected)]}


asked = json.load(sys.stdin)
print(json.dumps({**lower(asked), **plan(asked)}))
