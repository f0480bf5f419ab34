"""Export a module with `torch.export`, trying the documented remedies in order when it refuses.

    1. every dynamic size by name
    2. the fixes that torch suggests in its message (a size that the model fixes, a bound, a relation between two sizes)
    3. guards on shapes become checks at run time (`prefer_deferred_runtime_asserts_over_guards`)
    4. both
    5. dynamic sizes are left to torch (`Dim.AUTO`), without and with 3
    6. a Hugging Face model whose attention or experts are run by code that cannot be traced gets those that can

Source: https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/export.html (dynamic shapes, common errors).
"""

from __future__ import annotations

import io
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from tilecut_passes.example_inputs import DynamicDims
from tilecut_runtime.errors import CaptureError, first_line
from tilecut_runtime.manifest import DimRange

# Composite ops that are written in terms of others.
SPELLED_OUT = (torch.ops.aten.einsum.default, torch.ops.aten.tensordot.default, torch.ops.aten.bilinear.default)
# input -> dimension -> Dim
Shapes = dict[str, Any]
# A model may need several of torch's suggestions, one after another.
SUGGESTIONS = 3
SUGGESTED = "torch's suggested fixes of dynamic sizes"
DEFERRED = "shape guards checked at run time"
FREE = "dynamic sizes left to torch (Dim.AUTO)"
# What a Hugging Face config says of an implementation -> the one that can be traced on any device.
TRACEABLE = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}

log = logging.getLogger("tilecut.capture")


def export_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    constants: Mapping[str, Any],
    dynamic: DynamicDims,
    ranges: Mapping[str, DimRange],
) -> tuple[ExportedProgram, list[str]]:
    """Export `model(**tensors, **constants)` functionally; returns the program and a note for the remedy that it took.

    Args:
        dynamic: input -> dimension -> name of the dynamic size.
        ranges: least and greatest value of a named size, where it is known.

    Raises:
        CaptureError: torch.export refuses whatever is tried; names the line of the model's code where it stopped.
    """
    kwargs, none = {**tensors, **constants}, dict.fromkeys(constants)

    def export(shapes: Shapes, deferred: bool) -> ExportedProgram:
        program = torch.export.export(
            model,
            (),
            kwargs,
            dynamic_shapes={**shapes, **none},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )
        return program if _is_canonical(program) else program.run_decompositions(_spelled_out())

    def trace() -> tuple[ExportedProgram | None, str, Exception | None]:
        return try_remedies(export, list(tensors), dynamic, ranges)

    program, remedy, failure = trace()
    if program is None:
        with _traceable(model) as changed:
            if changed:
                program, remedy, _ = trace()
                remedy = "; ".join([*changed, *([remedy] if remedy else [])])
    if program is None:
        assert failure is not None
        raise _capture_error(model, failure) from failure
    return program, [f"capture: {remedy}, because export refused at first: {_why(failure)}"] if failure else []


def try_remedies(
    export: Callable[[Shapes, bool], ExportedProgram],
    inputs: Sequence[str],
    dynamic: DynamicDims,
    ranges: Mapping[str, DimRange],
) -> tuple[ExportedProgram | None, str, Exception | None]:
    """The first export that succeeds, the remedy that it took, and why the very first was refused.

    Args:
        export: exports with the given dynamic shapes (input -> dimension -> `Dim`), guards deferred or not.
    """
    names = dict.fromkeys(name for dims in dynamic.values() for name in dims.values())
    limits = {name: ranges.get(name, DimRange(1, None)) for name in names}
    sizes = {name: Dim(name, min=limits[name].min, max=limits[name].max) for name in names}
    named = {k: {d: sizes[n] for d, n in dynamic.get(k, {}).items()} for k in inputs}
    free = {k: dict.fromkeys(dynamic.get(k, {}), Dim.AUTO) for k in inputs}
    first: Exception | None = None
    attempts = (((), named), ((DEFERRED,), named), ((FREE,), free), ((FREE, DEFERRED), free))
    for remedies, start in attempts if names else attempts[:1]:
        shapes: Shapes | None = start
        for suggested in range(SUGGESTIONS + 1):
            if shapes is None:
                break
            try:
                with quiet_torch():
                    program = export(shapes, DEFERRED in remedies)
                return program, ", ".join([*remedies, *([SUGGESTED] if suggested else [])]), first
            # torch.export raises whatever the model's own code raises.
            except Exception as e:
                log.debug("export %s: %s", remedies, first_line(e))
                first = first or e
                if _hopeless(first):
                    return None, "", first
                shapes = _suggested(e, shapes)
    return None, "", first


def _suggested(failure: Exception, shapes: Shapes) -> Shapes | None:
    """The dynamic shapes with the fixes that torch's message suggests; None where it suggests none."""
    _, found, fixes = str(failure).partition("Suggested fixes")
    if not found or not isinstance(failure, UserError):
        return None
    # The advice that follows them confuses torch's own parser.
    fixes = fixes.partition("\n\n")[0]
    try:
        return cast(Shapes, refine_dynamic_shapes_from_suggested_fixes(found + fixes, shapes))
    # A suggestion in a form that the parser does not know.
    except (ValueError, KeyError, AssertionError, SyntaxError, NameError) as e:
        log.debug("suggested fixes: %s", first_line(e))
        return None


@contextmanager
def _traceable(model: nn.Module) -> Iterator[list[str]]:
    """Inside, a Hugging Face model's attention and experts are run by code that can be traced; says what was changed."""
    changed: dict[str, str] = {}
    for what, wanted in TRACEABLE.items():
        now, change = getattr(getattr(model, "config", None), f"_{what}", None), getattr(model, f"set_{what}", None)
        if change is None or now in (None, wanted):
            continue
        try:
            change(wanted)
        # An architecture that lacks the implementation says so with an error class of its own choice.
        except Exception as e:
            log.debug("set_%s(%r): %s", what, wanted, first_line(e))
            continue
        changed[what] = str(now)
    try:
        yield [f"{what} {TRACEABLE[what]!r} instead of {now!r}" for what, now in changed.items()]
    finally:
        for what, now in changed.items():
            getattr(model, f"set_{what}")(now)


def _hopeless(error: Exception) -> bool:
    """Whether no choice of dynamic sizes can help: the code decides on a tensor's values, or cannot be called so."""
    return "DataDependent" in type(error).__name__ or isinstance(error, TypeError | AttributeError)


def _spelled_out() -> dict[Any, Callable[..., Any]]:
    """The decompositions of `SPELLED_OUT`; with any table at all, programs become functional."""
    known = torch.export.default_decompositions()
    return {op: known[op] for op in SPELLED_OUT}


def _is_canonical(program: ExportedProgram) -> bool:
    """Whether no op writes in place, no sub-graph is called, and no op is spelled in a language of its own.

    Tracing a program again to make it so takes seconds.
    """
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return all(
        not op._schema.is_mutable and op not in SPELLED_OUT
        if isinstance(op, torch._ops.OpOverload)
        else getattr(op, "__module__", "") in ("_operator", "torch")
        for op in calls
    ) and not any(n.op == "get_attr" for n in program.graph.nodes)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """torch logs and prints whole graphs and tracebacks before it raises; the exception says what matters."""
    loggers = [
        logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    ]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            yield
    finally:
        log.debug("printed during export:\n%s", printed.getvalue())
        for one, level in zip(loggers, levels):
            one.setLevel(level)


def _capture_error(model: nn.Module, failure: Exception) -> CaptureError:
    what = first_line(failure, 400)
    fix = "pass example_inputs that fit forward, or rewrite that line"
    if "DataDependent" in type(failure).__name__ or "data-dependent" in str(failure):
        fix = (
            "the line decides on a tensor's value: drop an `if` whose branch does nothing when nothing is selected, "
            "else use torch.where, torch.cond or a mask instead of if, .item() or .tolist()"
        )
    if "not a known type" in str(failure):
        fix = "return a tensor, a tuple or a dict, or register the type with torch.utils._pytree"
    return CaptureError(f"{type(model).__name__}", f"torch.export stopped at {_users_line(failure)}: {what}", fix=fix)


def _why(failure: Exception) -> str:
    """Why an export was refused, in one line: of a violated constraint, the constraint."""
    violated = re.search(r"^\s*- (Not all values of .*)$", str(failure), re.MULTILINE)
    return violated[1] if violated else first_line(failure)


def _users_line(failure: Exception) -> str:
    """File, line and source of the deepest frame that is neither torch's nor ours."""
    ours, torchs = Path(__file__).parent, Path(torch.__file__).parent
    frames = [
        f
        for f in traceback.extract_tb(failure.__traceback__)
        if not f.filename.startswith("<")
        and torchs not in Path(f.filename).parents
        and ours not in Path(f.filename).parents
        and Path(f.filename).name != "contextlib.py"
    ]
    if not frames:
        # Constraint violations are raised after tracing; torch names the user's line in the message, when it can.
        named = re.search(r'File "([^"]+)", line (\d+)', str(failure))
        return f"{named[1]}:{named[2]}" if named else "a check inside torch itself"
    return f"{frames[-1].filename}:{frames[-1].lineno} `{(frames[-1].line or '').strip()}`"
