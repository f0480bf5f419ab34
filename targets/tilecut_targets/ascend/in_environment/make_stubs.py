"""Make libraries that stand in for CANN's, so that torch_npu can be imported where CANN is not. Runs inside "ascend-air".

Asked: {"folder": the environment's}. Writes FOLDER/stubs/. Answers {"symbols": how many functions are stubbed}.

torch_npu's own libraries are linked to some of CANN's (libascendcl.so and others). Every function that they want and that
neither they nor torch nor the system has is defined once, in libcann_stub.so, and returns 0; a library of each wanted name
leads to it. Nothing can run on a device with these: schemas, meta kernels and converters are what works.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TOOLS = ("gcc", "nm", "readelf")
# What torch_npu asks at import, and that must be answered with more than 0.
ANSWERS = {
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B3"; }',
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 0; return 0; }",
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "no CANN here, a stub"; }',
}
# Opened by name at run time, so that no library lists it.
OPENED = ("libacl_tdt_channel.so",)
# Tables that C++ reads, not functions that it calls.
DATA = ("_ZTI", "_ZTV", "_ZTS")
TABLE_BYTES = 256


def main() -> None:
    """Answer on stdout what was asked on stdin."""
    missing_tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing_tools:
        sys.exit(f"{', '.join(missing_tools)} not found on PATH: install gcc and binutils")
    out = Path(json.load(sys.stdin)["folder"]) / "stubs"
    out.mkdir(exist_ok=True)
    packages = sysconfig.get_paths()["purelib"]
    wanting = [
        found
        for pattern in ("_C*.so", "lib/*.so", "dynamo/torchair/core/*.so")
        for found in glob.glob(f"{packages}/torch_npu/{pattern}")
    ]
    having = wanting + glob.glob(f"{packages}/torch/lib/*.so*") + system_libraries(wanting)
    held = {name for library in having for name, _ in symbols(library, "--defined-only")}
    wanted = {name for library in wanting for name, kind in symbols(library, "--undefined-only") if kind not in "wWvV"}
    # Python itself has its symbols in the executable.
    stubbed = sorted(name for name in wanted - held if not name.startswith(("Py", "_Py")))
    build(out, stubbed, wanting, {os.path.basename(library) for library in having})
    print(json.dumps({"symbols": len(stubbed)}))


def symbols(library: str, which: str) -> list[tuple[str, str]]:
    """(name without version, kind) of a library's dynamic symbols."""
    lines = run("nm", "-D", which, library).splitlines()
    return [(line.split()[-1].split("@")[0], line.split()[-2]) for line in lines if len(line.split()) > 1]


def needed(library: str) -> list[str]:
    """The names of the libraries that one is linked to."""
    return re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", library))


def system_libraries(wanting: list[str]) -> list[str]:
    """Where the loader finds those of the wanted libraries that the system has."""
    listed = (run("ldd", library) for library in wanting)
    return sorted({path for text in listed for path in re.findall(r"=> (/\S+)", text)})


def build(out: Path, stubbed: list[str], wanting: list[str], having: set[str]) -> None:
    """Compile the stub, and a library of each wanted name that leads to it."""
    lines = [f"char {name}[{TABLE_BYTES}];" for name in stubbed if name.startswith(DATA)]
    lines += [ANSWERS.get(name, f"long {name}(void) {{ return 0; }}") for name in stubbed if not name.startswith(DATA)]
    source = out / "stub.c"
    source.write_text("\n".join(lines) + "\n")
    shared = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin"]
    run(*shared, "-o", str(out / "libcann_stub.so"), str(source), "-Wl,-soname,libcann_stub.so")
    names = {name for library in wanting for name in needed(library)} | set(OPENED)
    own = ("libtorch", "libc10", "libtensorpipe", "ld-linux")
    for name in sorted(names - having):
        if not name.startswith(own):
            link = ["-Wl,--no-as-needed", f"-L{out}", "-lcann_stub", f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN"]
            run(*shared, "-nostdlib", "-o", str(out / name), *link)


def run(*command: str) -> str:
    """A command's stdout, or the end of this script with its stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]}: {done.stderr[-800:]}")
    return done.stdout


main()
