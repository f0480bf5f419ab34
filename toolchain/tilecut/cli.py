"""The `tilecut` command: compile, explore, inspect, verify, bench, run, export-genai, build, tune, targets, toolchain.

Exit codes: 0 done; 1 an error, said in one line; 2 wrong usage; 3 a verification failed.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from tilecut import __version__, cli_inputs, cli_toolchain, show
from tilecut.cli_config import BUDGET, make_config, takes_config
from tilecut_runtime.errors import ArtifactError, TilecutError, VerificationError
from tilecut_runtime.generate import Step
from tilecut_runtime.manifest import Manifest, Rung, read_json
from tilecut_runtime.session import MAX_THREADS, load

FAILED, UNVERIFIED = 1, 3
# No peers.
NONE = "none"
GENERATION = "Generation"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Cut transformers to the tiles of the kernels they will run on.",
    epilog="Exit codes: 0 done, 1 error, 2 wrong usage, 3 verification failed.",
)
app.add_typer(cli_toolchain.app, name="toolchain")
out, err = Console(), Console(stderr=True)

Model = Annotated[Path, typer.Argument(help="folder of a Hugging Face model")]
TargetName = Annotated[str, typer.Option("--target", help="edge, edge:<runtime>, cuda, cuda:<chips, type>, ascend[:<chip>]")]
Calibration = Annotated[Path | None, typer.Option(help=".txt, .tsv or .jsonl; default: general text")]
Folder = Annotated[Path, typer.Argument(help="an artifact's folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, nothing else")]
Device = Annotated[str | None, typer.Option(help='"cpu", "reference", ..; default: what the artifact was compiled for')]
Threads = Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of one run")]


def main() -> None:
    """Run the command line; every TilecutError becomes one line on stderr and an exit code."""
    try:
        app()
    except TilecutError as e:
        _fail(type(e).__name__, str(e), UNVERIFIED if isinstance(e, VerificationError) else FAILED)
    except ModuleNotFoundError as e:
        _fail(
            type(e).__name__, f"{e.name} is needed for this and not installed; pip install 'tilecut[compile]'", FAILED
        )


def is_main_process() -> bool:
    """Whether this process is the one that prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _fail(kind: str, message: str, code: int) -> NoReturn:
    if "--json" in sys.argv:
        print(json.dumps({"error": {"kind": kind, "message": message}}))
    err.print(f"[bold red]error:[/] {show.plain(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(f"tilecut {__version__}")
        raise typer.Exit


@app.command("compile")
@takes_config
def compile_(
    model: Model,
    options: dict[str, Any],
    target: TargetName = "edge",
    output: Annotated[Path | None, typer.Option(help="the artifact's folder; default <model>-<target>")] = None,
    calibration: Calibration = None,
    dense: Annotated[bool, typer.Option("--dense", help="cut nothing, only fuse and lower")] = False,
    sparsity: Annotated[
        float | None, typer.Option(help="fraction of the prunable MACs that goes, 0 to 1", rich_help_panel=BUDGET)
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(help="milliseconds of one run, by the target's cost model", rich_help_panel=BUDGET),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="a decoder with a key-value cache, for `tilecut run --prompt`")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a text, the prompt's included; default: the model's positions")
    ] = None,
    measure: Annotated[bool, typer.Option(help="measure latency against the dense model")] = True,
    as_json: AsJson = False,
) -> None:
    """Prune, legalize, fuse, lower and emit a model, and verify what was emitted."""
    from tilecut.compile import compile_pruned
    from tilecut_targets.find_target import find_target

    config = make_config(options, sparsity=sparsity, max_latency_ms=max_latency_ms)
    with show.compile_progress(err, quiet=as_json or not is_main_process()) as progress:
        artifact = compile_pruned(
            model,
            find_target(target).quantized(config.quantize),
            calibration=calibration,
            config=None if dense else config,
            output=output,
            generate=generate,
            max_length=max_length,
            measure=measure,
            progress=progress,
        )
    if not is_main_process():
        return
    if as_json:
        print(json.dumps({"path": str(artifact.path), "report": artifact.report}))
    else:
        show.report(out, artifact.report)
        out.print(
            f"artifact {artifact.path}\nreport   {artifact.path / 'report.html'}", highlight=False, soft_wrap=True
        )


@app.command()
@takes_config
def explore(
    model: Model,
    options: dict[str, Any],
    target: TargetName = "edge",
    output: Annotated[Path | None, typer.Option(help="a folder; default <model>-<target>-explore")] = None,
    calibration: Calibration = None,
    sparsities: Annotated[
        str | None, typer.Option(help="the budgets, comma-separated; default 0.2,0.3,..,0.8", rich_help_panel=BUDGET)
    ] = None,
    latencies_ms: Annotated[
        str | None, typer.Option(help="budgets in milliseconds instead, comma-separated", rich_help_panel=BUDGET)
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="cosine, accuracy, perplexity, loss or kl; default: what there is")
    ] = None,
    emit: Annotated[bool, typer.Option("--emit", help="write an artifact of every budget")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="time the artifacts; turns --emit on")] = False,
    as_json: AsJson = False,
) -> None:
    """Cut a model to many budgets: which of them are worth their loss, and where more speed begins to cost more."""
    from tilecut.exploration import PAGE
    from tilecut.explore import explore as sweep

    config = make_config(options)
    budgets = cli_inputs.fractions("--sparsities", sparsities) if sparsities is not None else None
    milliseconds = cli_inputs.fractions("--latencies-ms", latencies_ms) if latencies_ms is not None else None
    with show.compile_progress(err, quiet=as_json or not is_main_process()) as progress:
        found = sweep(
            model,
            target,
            calibration=calibration,
            config=config,
            output=output,
            sparsities=budgets,
            latencies_ms=milliseconds,
            quality=quality,
            emit=emit,
            measure=measure,
            progress=progress,
        )
    if not is_main_process():
        return
    if as_json:
        print(json.dumps({"path": str(found.path), "report": found.report}))
    else:
        show.front(out, found.report)
        out.print(f"report {found.path / PAGE}", highlight=False, soft_wrap=True)


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Say what an artifact is: target, inputs, outputs, files, what was kept, how far it was verified."""
    manifest = Manifest.read(folder)
    path = folder / "report.json"
    report = read_json(path) if path.is_file() else None
    if as_json:
        print(json.dumps({"manifest": asdict(manifest), "report": report}))
        return
    show.manifest(out, manifest)
    if report is not None:
        # Its hash is not checked here: it may hold anything.
        try:
            show.report(out, report)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise ArtifactError(str(path), f"malformed report ({type(e).__name__}: {e})") from e


@app.command()
def verify(folder: Folder, device: Device = None, as_json: AsJson = False) -> None:
    """Check every file's hash and run the artifact on its reference inputs."""
    rungs = _verify(folder, device)
    if as_json:
        print(json.dumps({"rungs": [asdict(r) for r in rungs]}))
    else:
        show.rungs(out, rungs)
    if any(r.status == "failed" for r in rungs):
        raise typer.Exit(UNVERIFIED)


def _verify(folder: Path, device: str | None) -> list[Rung]:
    """The target's own ladder where the compiler is installed, else what the runtime alone can check."""
    from tilecut_runtime.reference import verify_on_device

    if device is not None:
        return verify_on_device(folder, device)
    try:
        from tilecut.artifact import Artifact
    except ModuleNotFoundError:
        return verify_on_device(folder)
    return Artifact(folder).verify()


@app.command()
def bench(
    folders: Annotated[list[Path], typer.Argument(help="one artifact, or several to time side by side")],
    batch: Annotated[str, typer.Option(help="batch sizes, comma-separated")] = "1",
    sequence: Annotated[str, typer.Option("--sequence", "--seq", help="lengths, comma-separated")] = "128",
    threads: Annotated[str, typer.Option(help="CPU threads of one run, comma-separated")] = "1",
    rounds: Annotated[int, typer.Option(min=1, help="counted rounds")] = 30,
    dense: Annotated[Path | None, typer.Option(help="folder of the dense Hugging Face model, to time beside")] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="all, none, or of eager,compile,export,ort,onnxscript,openvino,executorch; with --dense: all"),
    ] = None,
    memory: Annotated[bool, typer.Option(help="measure memory, each contender in a process of its own")] = True,
    output: Annotated[Path | None, typer.Option(help="a folder for bench.json and bench.png")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, memory and size: interleaved medians, beside the dense model and other runtimes."""
    from tilecut.bench_artifacts import ALL, bench_artifacts

    if output is not None:
        from tilecut.draw_front import check_matplotlib

        check_matplotlib("bench")
        cli_inputs.make_folder("--output", output)
    chosen = peers or (ALL if dense is not None else NONE)
    with show.compile_progress(err, quiet=as_json) as progress:
        made = bench_artifacts(
            folders,
            batch=cli_inputs.numbers("--batch", batch),
            sequence=cli_inputs.numbers("--sequence", sequence),
            threads=cli_inputs.numbers("--threads", threads, MAX_THREADS),
            rounds=rounds,
            device=device,
            dense=dense,
            peers=() if chosen == NONE else cli_inputs.names(chosen),
            memory=memory,
            progress=progress,
        )
    made = {**made, "command": shlex.join(["tilecut", *sys.argv[1:]])}
    if output is not None:
        from tilecut.draw_bench import draw_bench

        (output / "bench.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        (output / "bench.png").write_bytes(draw_bench(made))
    if as_json:
        print(json.dumps(made))
    else:
        show.bench(out, made)


@app.command()
def run(
    folder: Folder,
    inputs: Annotated[Path | None, typer.Option(help=".npz file with an array for every input")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="a text, tokenized with the artifact's tokenizer; may be repeated")
    ] = None,
    outputs: Annotated[Path | None, typer.Option(help=".npz file to write the outputs to")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="a text to continue; of an artifact compiled with --generate", rich_help_panel=GENERATION)
    ] = None,
    decoder_input_ids: Annotated[
        str | None,
        typer.Option(help="ids a decoder begins with; --prompt or --inputs are its encoder's", rich_help_panel=GENERATION),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="at most so many", rich_help_panel=GENERATION)] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most likely token", rich_help_panel=GENERATION)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="draw from so many tokens", rich_help_panel=GENERATION)] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from so much probability", rich_help_panel=GENERATION)] = None,
    repetition_penalty: Annotated[float, typer.Option(help="above 1: fewer repetitions", rich_help_panel=GENERATION)] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="a text that ends it; repeatable", rich_help_panel=GENERATION)] = None,
    seed: Annotated[int | None, typer.Option(help="of the draws", rich_help_panel=GENERATION)] = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run an artifact on arrays or texts, or let it continue a prompt or what an encoder reads."""
    session = load(folder, device, threads)
    if prompt is not None or decoder_input_ids is not None:
        start = None if decoder_input_ids is None else [cli_inputs.ids("--decoder-input-ids", decoder_input_ids)]
        steps = session.stream(
            cli_inputs.read_prompt(session, prompt, inputs, bool(text or outputs)),
            max_new_tokens=max_new_tokens,
            decoder_input_ids=start,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop or (),
            seed=seed,
        )
        _continue(steps, as_json)
        return
    results = session.run(cli_inputs.read_inputs(session, inputs, text))
    if outputs is not None:
        cli_inputs.write_outputs(outputs, results)
    if as_json:
        print(json.dumps({"outputs": {k: {"dtype": v.dtype.name, "shape": list(v.shape)} for k, v in results.items()}}))
    else:
        show.results(out, results)


def _continue(steps: Iterator[Step], as_json: bool) -> None:
    """Print a text as it comes."""
    ids: list[int | None] = []
    text, reason = None, None
    for step in steps:
        ids.append(step.tokens[0])
        # Without a tokenizer its ids.
        piece = f"{ids[-1]} " if step.texts is None else step.texts[0]
        text = None if step.texts is None else (text or "") + piece
        reason = step.reasons[0]
        if not as_json:
            # What was asked for, as it is: no markup, no wrapping.
            print(piece, end="", flush=True)
    said = {"ids": ids} if text is None else {"text": text}
    print(json.dumps({**said, "tokens": len(ids), "reason": reason}) if as_json else "")


@app.command()
def build(
    folder: Folder,
    device: Annotated[str, typer.Option(help='"cuda", "cuda:1", or "cpu"')] = "cuda",
    as_json: AsJson = False,
) -> None:
    """Make PyTorch's native package of a cuda artifact, on the machine whose GPU will run it."""
    from tilecut_runtime.native_package import build_native

    rung = build_native(folder, device)
    if as_json:
        print(json.dumps({"rungs": [asdict(rung)]}))
    else:
        show.rungs(out, [rung])


@app.command("export-genai")
def export_genai(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="a folder that is empty, or not there")],
    as_json: AsJson = False,
) -> None:
    """Write an artifact compiled with --generate as a folder that onnxruntime-genai opens."""
    from tilecut.artifact import Artifact

    written = Artifact(folder).write_genai(output)
    if as_json:
        print(json.dumps({"path": str(written)}))
    else:
        out.print(f"genai {written}", highlight=False, soft_wrap=True)


@app.command()
def tune(
    widths: Annotated[str, typer.Option(help="head widths, comma-separated")] = "64,128",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    directions: Annotated[str, typer.Option(help="of forward, decode, dq, dkdv")] = "forward,decode,dq,dkdv",
    output: Annotated[Path | None, typer.Option(help="the table; default: this machine's")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the attention kernels' tiles on the GPU that is here, and keep those that are faster than the table's."""
    from tilecut_runtime.kernels.choose_tile import measured_table
    from tilecut_targets.cuda.tune_tiles import as_rows, write_measured
    from tilecut_targets.cuda.tune_tiles import tune as measure

    wanted = cli_inputs.numbers("--widths", widths)
    rows = measure(wanted, dtype, cli_inputs.names(directions))
    path = output or measured_table()
    written = write_measured(rows, path)
    if as_json:
        print(json.dumps({"rows": as_rows(rows), "written": written, "path": str(path)}))
    else:
        show.tiles(out, as_rows(rows))
        out.print(f"{written} better tiles written to {path}", highlight=False, soft_wrap=True)


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the targets and the shapes they like."""
    from tilecut_targets.find_target import TARGETS, find_target

    rows = {name: find_target(name).lattice().describe() for name in TARGETS}
    if as_json:
        print(json.dumps({"targets": rows}))
    else:
        show.targets(out, rows)
