"""Forms of the dense model that an edge artifact is timed against, all under a plain session with default options."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime as ort
import torch

from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass, run_passes
from tilecut_runtime.errors import first_line
from tilecut_runtime.reference import Arrays
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.decompose_norms import decomposed_rotary
from tilecut_targets.edge import ort_ops
from tilecut_targets.target import Contenders
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx

PRUNED, DENSE = "pruned artifact", "dense, same path"
EXPORTED, OPTIMIZED = "dense, torch's export", "dense, ORT's optimizer"


def contend(lowering: Sequence[Pass], dense: Graph, artifact: Path, threads: int, scratch: Path) -> Contenders:
    """Write the dense forms into `scratch` and open everything; a peer that fails is named with its reason."""
    fused = dense.copy()
    run_passes(fused, [FuseAttention(), *lowering])
    # The dense model may call the ops itself, which torch has no ONNX form for.
    decompose = {
        torch.ops.tilecut.attention.default: decomposed_attention,
        torch.ops.tilecut.rotary.default: decomposed_rotary,
    }
    write_onnx(fused, scratch / "dense.onnx", ort_ops.ONNX_OPSET, decompose)
    exported = dense.copy()
    run_passes(exported, [UnpackAttention()])
    write_onnx(exported, scratch / "exported.onnx", ort_ops.ONNX_OPSET, decompose)
    runners = {
        PRUNED: plain_session(artifact, threads),
        DENSE: plain_session(scratch / "dense.onnx", threads),
        EXPORTED: plain_session(scratch / "exported.onnx", threads),
    }
    failed = {}
    # A peer that breaks on this model is a result to report, not a reason to stop.
    try:
        optimize(scratch / "exported.onnx", scratch / "optimized.onnx")
        runners[OPTIMIZED] = plain_session(scratch / "optimized.onnx", threads)
    except Exception as e:
        failed[OPTIMIZED] = first_line(e)
    return Contenders(runners, failed)


def optimize(source: Path, path: Path) -> None:
    """onnxruntime.transformers.optimizer with its BERT fusions; it finds head count and width itself."""
    from onnxruntime.transformers import optimizer

    logger = logging.getLogger("onnxruntime.transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        optimizer.optimize_model(
            str(source), model_type="bert", num_heads=0, hidden_size=0, opt_level=0
        ).save_model_to_file(str(path))
    finally:
        logger.setLevel(level)


def plain_session(path: Path, threads: int) -> Callable[[Arrays], object]:
    """A runner over a session as a user would open it, but for the thread count and for threads that rest between runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # By default idle threads go on spinning after a run, on the cores that the next session in turn is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)
