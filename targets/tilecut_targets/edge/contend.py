"""Forms of the dense model that an edge artifact is timed against, all under a plain session with default options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass, run_passes
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.prefill_inputs import prefill_inputs
from tilecut_runtime.reference import Arrays
from tilecut_runtime.timing import PRUNED
from tilecut_targets import open_peers, peers
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.target import Contenders

DENSE = "dense, same path"
# The peers that onnxruntime runs.
EXPORTED, OPTIMIZED, ONNXSCRIPT = (f"dense, {p.title}" for p in (peers.EXPORT, peers.ORT, peers.ONNXSCRIPT))


def contend(
    fusing: Sequence[Pass],
    forms: Forms,
    dense: Graph,
    artifact: Path,
    threads: int,
    scratch: Path,
    manifest: Manifest | None = None,
) -> Contenders:
    """Write the dense forms into `scratch` and open everything; a peer that fails is named with its reason.

    An artifact with a cache, as its manifest says, reads the texts into empty caches; the others compute all tokens' outputs.
    """
    lowered = dense.copy()
    run_passes(lowered, [*fusing, *forms.passes])
    write_forms(lowered, scratch / "dense.onnx", forms)
    runners: dict[str, Callable[[Arrays], object]] = {
        PRUNED: _artifact(artifact, manifest, threads),
        DENSE: plain_session(scratch / "dense.onnx", threads),
    }
    failed = {}
    for name, peer in ((EXPORTED, peers.EXPORT), (OPTIMIZED, peers.ORT), (ONNXSCRIPT, peers.ONNXSCRIPT)):
        # A peer that breaks on this model is a result to report, not a reason to stop.
        try:
            peer.write(dense, scratch)
            runners[name] = peer.open(scratch, threads)
        except Exception as e:
            failed[name] = peer.why(e)
    return Contenders(runners, failed)


def _artifact(path: Path, manifest: Manifest | None, threads: int) -> Callable[[Arrays], object]:
    run = plain_session(path, threads)
    if manifest is None or manifest.generation is None:
        return run
    if manifest.encoder is None:
        return prefilling(manifest, run)
    apart = manifest.of_encoder
    session = open_peers.open_session(path.parent / manifest.entry["encoder"], threads)
    names = [spec.name for spec in apart.outputs]
    return prefilling(
        manifest,
        run,
        lambda arrays: dict(zip(names, session.run(names, {spec.name: arrays[spec.name] for spec in apart.inputs}))),
    )


def prefilling(
    manifest: Manifest, run: Callable[[Arrays], object], encode: Callable[[Arrays], Arrays] | None = None
) -> Callable[[Arrays], object]:
    """A model with a cache as a runner of whole texts: they are read into empty caches, behind what `encode` gives."""
    assert manifest.generation is not None
    tokens = manifest.generation.tokens
    made: dict[int, Arrays] = {}

    def prefill(arrays: Arrays) -> object:
        # Not timed again: the same arrays come every round.
        if id(arrays[tokens]) not in made:
            made[id(arrays[tokens])] = prefill_inputs(manifest, arrays[tokens])
        empty = made[id(arrays[tokens])]
        return run(empty if encode is None else {**empty, **encode(arrays)})

    return prefill


def plain_session(path: Path, threads: int) -> Callable[[Arrays], object]:
    """A runner over a session as a user would open it; see `open_session`."""
    session = open_peers.open_session(path, threads)
    return lambda arrays: session.run(None, arrays)
