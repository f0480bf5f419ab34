"""Run the MLIR of a kernel on this machine's CPU, as linalg or after HFusion. Runs inside "ascend-kernels".

Asked: {"linalg": file, "kernel": function, "stage": "linalg" | "hfusion", "family": "a2" | "a3" | "a950",
"options": [of bishengir-compile], "work": an empty folder, "inputs": .npz, "outputs": .npz to write,
"runs": [{"arguments": [...], "programs": n}, ..]}. An argument is the name of an array in "inputs" (float16, bfloat16 as
uint16, or int8), {"float": x} or {"int": n}. The arrays are written to "outputs" as the runs left them. Answers
{"seconds": of all runs}.

bishengir-opt lowers linalg to the LLVM dialect, triton's own translation to LLVM IR, and llvmlite compiles that. Stage
"hfusion" takes what bishengir-compile holds after the last of its fusing passes, before the cube and the vector cores'
work is told apart, and turns the dialect back into linalg first.
"""

import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import ascendnpuir
import llvmlite.binding as llvmlite
import numpy as np
from triton._C.libtriton import ir, llvm

BIN = Path(ascendnpuir.__path__[0]) / "bin"
LAST_STAGE = "convert-hfusion-to-hivm"
# bishengir-opt 1.2.0 turns `vnot` into the identity: it is written as an exclusive or before.
VNOT = re.compile(
    r"%(\w+) = hfusion\.elemwise_unary \{fun = #hfusion\.unary_fn<vnot>\} ins\((%\w+) : (tensor<[^>]*>)\)[^\n]*"
)
# What the NPU says to itself, in a dialect that upstream passes do not take.
HEADER = (r"(?m)^module attributes .*\{$", "module {")
REWRITES = (
    HEADER,
    (r"\{(hacc|tt|hivm)\.[^}]*\}", ""),
    (r'input_precison = "[a-z0-9]+"', ""),
    (r', global_kernel = "local", parallel_mode = "simd"', ""),
    (r" attributes \{[^}]*SyncBlockLockArgIdx[^}]*\}", ""),
    (
        r"memref\.copy (%\w+), (%\w+) : (memref<.*>) to (memref<.*>)",
        r"linalg.copy ins(\1 : \3) outs(\2 : \4)",
    ),
)
PASSES = (
    "--convert-elementwise-to-linalg",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--canonicalize",
    "--convert-linalg-to-loops",
    "--buffer-deallocation-pipeline",
    "--convert-bufferization-to-memref",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--arith-expand=include-bf16=true",
    "--memref-expand",
    "--convert-math-to-llvm",
    "--convert-vector-to-llvm",
    "--convert-index-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-arith-to-llvm",
    "--convert-func-to-llvm",
    "--convert-cf-to-llvm",
    "--reconcile-unrealized-casts",
)
# Bytes of the two buffers (locks and workspace) that a kernel takes first; the linalg IR does not use them.
SCRATCH = 1 << 16


def opt(text: str, work: Path, name: str, passes) -> str:
    """The MLIR after bishengir-opt's passes."""
    (work / f"{name}.in.mlir").write_text(text)
    command = [BIN / "bishengir-opt", work / f"{name}.in.mlir", "--allow-unregistered-dialect", *passes]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"bishengir-opt: {ran.stderr[:1500]}")
    return ran.stdout


def fused(linalg: Path, asked: dict, work: Path) -> str:
    """The linalg MLIR after bishengir-compile's HFusion passes, written as linalg again."""
    printing = ("--mlir-disable-threading", "--mlir-print-ir-module-scope", f"--mlir-print-ir-before={LAST_STAGE}")
    compiler = "bishengir-compile-a5" if asked["family"] == "a950" else "bishengir-compile"
    command = [BIN / compiler, linalg, *asked["options"], *printing, "-o", work / "kernel"]
    printed = subprocess.run(command, capture_output=True, text=True).stderr
    dumps = re.split(r"// -----// IR Dump Before [^\n]*\n", printed)
    module = re.search(r"^(#map.*?|module.*?)^\}\n", dumps[1], re.DOTALL | re.MULTILINE) if len(dumps) > 1 else None
    if module is None:
        raise SystemExit(f"bishengir-compile printed nothing before {LAST_STAGE}: {printed[:1000]}")
    text = VNOT.sub(
        lambda m: (
            f"%not_{m[1]} = arith.constant dense<true> : {m[3]}\n%{m[1]} = arith.xori {m[2]}, %not_{m[1]} : {m[3]}"
        ),
        re.sub(*HEADER, module[0]),
    )
    return opt(
        text, work, "hfusion", ("--execution-engine-convert-hfusion-to-upstream", "--linalg-generalize-named-ops")
    )


def lower(linalg: str, work: Path) -> str:
    """LLVM IR of the linalg MLIR."""
    for pattern, text in REWRITES:
        linalg = re.sub(pattern, text, linalg)
    text = re.sub(r" attributes \{[^}]*(SyncBlockLockArgIdx)[^}]*\}", "", opt(linalg, work, "linalg", PASSES))
    (work / "llvm.mlir").write_text(text)
    context = ir.context()
    ir.load_dialects(context)
    module = ir.parse_mlir_module(str(work / "llvm.mlir"), context)
    llvm.init_targets()
    return str(llvm.to_module(module, llvm.context()))


@ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64))
def memref_copy(size, source, target):
    """MLIR's runtime function of that name: copy between two strided memrefs of elements of `size` bytes."""

    def view(unranked):
        rank, held = unranked[0], ctypes.cast(unranked[1], ctypes.POINTER(ctypes.c_int64))
        sizes, strides = [held[3 + i] for i in range(rank)], [held[3 + rank + i] for i in range(rank)]
        if not all(sizes):
            return None
        extent = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides))
        memory = (ctypes.c_char * (extent * size)).from_address(held[1] + held[2] * size)
        array = np.frombuffer(memory, dtype=f"u{size}")
        return np.lib.stride_tricks.as_strided(array, sizes, [s * size for s in strides], writeable=True)

    to = view(target)
    if to is not None:
        np.copyto(to, view(source))


def compile_ir(text: str):
    """An execution engine that holds the code."""
    llvmlite.initialize_native_target()
    llvmlite.initialize_native_asmprinter()
    module = llvmlite.parse_assembly(text)
    module.verify()
    machine = llvmlite.Target.from_default_triple().create_target_machine(
        cpu=llvmlite.get_host_cpu_name(), features=llvmlite.get_host_cpu_features().flatten(), opt=3
    )
    builder = llvmlite.create_pass_builder(machine, llvmlite.PipelineTuningOptions(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    llvmlite.add_symbol("memrefCopy", ctypes.cast(memref_copy, ctypes.c_void_p).value)
    engine = llvmlite.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def memref(array) -> list:
    """A flat memref<?x..> as five arguments: allocated, aligned, offset, size, stride."""
    pointer = ctypes.c_void_p(array.ctypes.data)
    return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(array.size), ctypes.c_int64(1)]


def run(asked: dict) -> dict:
    """Compile and run, as the module's docstring says."""
    work, linalg = Path(asked["work"]), Path(asked["linalg"])
    after = asked["stage"] == "hfusion"
    engine = compile_ir(lower(fused(linalg, asked, work) if after else linalg.read_text(), work))
    address = engine.get_function_address(asked["kernel"])
    with np.load(asked["inputs"]) as held:
        arrays = {name: np.ascontiguousarray(held[name]) for name in held.files}
    scratch = np.zeros(SCRATCH, np.uint8)
    began = time.monotonic()
    for one in asked["runs"]:
        # HFusion's first argument is the address that the cores are synchronised through.
        values = [ctypes.c_int64(0)] if after else []
        values += [*memref(scratch), *memref(scratch)]
        for argument in one["arguments"]:
            if isinstance(argument, str):
                values += memref(arrays[argument])
            elif "float" in argument:
                values.append(ctypes.c_float(argument["float"]))
            else:
                values.append(ctypes.c_int32(argument["int"]))
        for program in range(one["programs"]):
            grid = [ctypes.c_int32(n) for n in (one["programs"], 1, 1, program, 0, 0)]
            called = [*values, *grid]
            ctypes.CFUNCTYPE(None, *[type(value) for value in called])(address)(*called)
    seconds = time.monotonic() - began
    np.savez(asked["outputs"], **arrays)
    return {"seconds": seconds}


print(json.dumps(run(json.load(sys.stdin))))
