"""`load` an artifact and run it: numpy (or DLPack) in, numpy out, by name; or generate, token ids or texts in and out.

`load` reads the manifest, checks the hashes of the files it is about to use and opens the session that the manifest's
`runtime` names, in huge pages where Linux has them. Inputs are checked against the manifest before the runtime sees them,
so that a wrong name, dtype, rank or size gives one error that says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilecut_runtime.errors import ArtifactError, InputError, first_line
from tilecut_runtime.generate import Generated, Step, generate, request_of, steps_of
from tilecut_runtime.huge_pages import in_huge_pages
from tilecut_runtime.manifest import DimRange, Manifest, TensorSpec
from tilecut_runtime.onnx_decoder import OnnxDecoder
from tilecut_runtime.openvino_decoder import OpenVinoDecoder

if TYPE_CHECKING:
    import onnxruntime

MAX_THREADS = 1024
# One checked batch in, the outputs in the manifest's order out.
Runner = Callable[[dict[str, np.ndarray]], Sequence[Any]]


class Session:
    """A loaded artifact. `run` checks its inputs; `inputs` and `outputs` describe them; `how` says what runs.

    `generate` and `stream` are for artifacts that were compiled with `generate=True`.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        runner: Runner,
        device: str,
        how: str = "onnxruntime",
        decoder: OnnxDecoder | OpenVinoDecoder | None = None,
        encoder: Session | None = None,
    ):
        self.path, self.manifest, self.device, self.how = path, manifest, device, how
        self._runner, self._decoder, self._encoder = runner, decoder, encoder

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every output."""
        return self.manifest.outputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run one batch.

        Args:
            inputs: for every input name a numpy array, or any object that offers DLPack on the CPU.

        Returns:
            For every output name a numpy array.

        Raises:
            InputError: a name, dtype, rank or size that does not fit the manifest, or numbers that the model cannot
                take, such as ids beyond its vocabulary.
        """
        arrays = check_inputs(inputs, self.manifest)
        return dict(zip((spec.name for spec in self.outputs), self._runner(arrays), strict=True))

    def run_many(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        max_tokens: int = 4096,
        padding: Mapping[str, float] | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """Run rows of different lengths, in batches of similar lengths; each gets the outputs that it would get alone.

        Args:
            inputs: for every row a dict of arrays [1, S, ..], or all without their first dimension: [S, ..].
            max_tokens: rows times length of the largest batch; bounds memory.
            padding: input name -> what fills it up, where no `attention_mask` of the model hides padding: a mask of
                another name or meaning, or ids of which the model needs no mask.

        Returns:
            For every row, in the order of `inputs`, its outputs without padding; without a first dimension where the row
            had none.

        Raises:
            InputError: a row that does not fit, or rows of different lengths that nothing hides the padding of.
        """
        from tilecut_runtime.run_many import run_many

        return run_many(self, inputs, max_tokens, padding)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        max_new_tokens: int = 128,
        *,
        decoder_input_ids: Any = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Any = (),
        eos: Any = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> Generated:
        """Continue prompts.

        Args:
            input_ids: ids [B, S] or [S], rows of ids of unequal lengths, a text or several texts.
                Of an encoder-decoder, what its encoder reads: the same, or its inputs by name where they are no ids.
            attention_mask: which ids are real, [B, S]; padding is on the left or on the right. None: all of them.
            max_new_tokens: of every row; a row also ends where the model has no position left.
            decoder_input_ids: of an encoder-decoder: ids that its decoder begins with, as `input_ids` may be given, one row
                for all or one each. None takes the model's own.
            temperature: logits are divided by it before one is drawn; 0 takes the most likely token.
            top_k: only so many most likely tokens are drawn from.
            top_p: only the most likely tokens that together have this probability are drawn from.
            repetition_penalty: by which logits of tokens that a row holds are made smaller (Keskar et al.,
                arXiv 1909.05858); 1 leaves them.
            stop: ids and strings that end a row, one or several; strings need the artifact's tokenizer.json.
            eos: ids that end a row; None takes the model's own.
            seed: of the draws; a row's draws do not depend on the other rows. None draws anew every time.

        Raises:
            InputError: what cannot be continued, or an option that is none.
        """
        request = request_of(
            self, input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop, eos, seed,
            decoder_input_ids, unknown,
        )  # fmt: skip
        return generate(self.decoder, request)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        max_new_tokens: int = 128,
        *,
        decoder_input_ids: Any = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Any = (),
        eos: Any = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> Iterator[Step]:
        """`generate`, token by token."""
        request = request_of(
            self, input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop, eos, seed,
            decoder_input_ids, unknown,
        )  # fmt: skip
        return steps_of(self.decoder, request)

    @property
    def decoder(self) -> OnnxDecoder | OpenVinoDecoder:
        """What runs steps with a cache.

        Raises:
            InputError: the artifact has no cache.
        """
        if self._decoder is None:
            raise InputError(
                "Session.generate", f"{self.path.name} was compiled without a cache", fix="compile it with generate=True"
            )
        return self._decoder

    @property
    def encoder(self) -> Session:
        """What runs the encoder of an encoder-decoder that was compiled with `generate=True`.

        Raises:
            InputError: the artifact has none.
        """
        if self._encoder is None:
            raise InputError(
                "Session.encoder", f"{self.path.name} has no encoder apart", wanted="an encoder-decoder with a cache"
            )
        return self._encoder

    def __repr__(self) -> str:
        inputs = "; ".join(map(str, self.inputs))
        return (
            f"Session({self.path.name!r}, target={self.manifest.target!r}, device={self.device!r}, inputs=[{inputs}])"
        )


def load(path: str | Path, device: str | None = None, threads: int | None = None) -> Session:
    """Open a compiled artifact.

    Args:
        path: the artifact's folder.
        device: None for what the artifact was compiled for; "cpu" for an edge or cuda artifact on the CPU; for an ascend
            artifact "npu:<number>", or "reference" for its verify twin in onnxruntime.
        threads: CPU threads that one run may use; None leaves the choice to the runtime.

    Raises:
        ArtifactError: the folder is no artifact, a file is missing, truncated or altered, or its runtime cannot be
            opened on this device.
        InputError: `threads` is no number of threads.
    """
    manifest = Manifest.read(path)
    folder = Path(path)
    if threads is not None and (
        not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
    ):
        raise InputError(
            "load", "threads must be a positive integer or None", got=repr(threads), wanted=f"at most {MAX_THREADS}"
        )
    if manifest.runtime not in RUNTIMES:
        raise ArtifactError(
            str(folder), "unknown runtime in the manifest", got=manifest.runtime, wanted=" or ".join(RUNTIMES)
        )
    with in_huge_pages():
        return RUNTIMES[manifest.runtime](folder, manifest, device, threads)


def check_inputs(inputs: Mapping[str, Any], manifest: Manifest) -> dict[str, np.ndarray]:
    """The inputs as arrays in the manifest's order, or one InputError."""
    specs = manifest.inputs
    if not isinstance(inputs, Mapping):
        raise InputError(
            "Session.run",
            "inputs must be a mapping from name to array",
            got=type(inputs).__name__,
            wanted="{" + ", ".join(spec.name for spec in specs) + "}",
        )
    names = [spec.name for spec in specs]
    if unexpected := [str(name) for name in inputs if name not in names]:
        raise InputError("Session.run", "unknown input name", got=", ".join(unexpected), wanted=", ".join(names))
    if missing := [name for name in names if name not in inputs]:
        raise InputError(
            "Session.run",
            "missing input",
            got=", ".join(map(str, inputs)) or "nothing",
            wanted=", ".join(missing) + " as well",
        )
    sizes: dict[str, tuple[int, str]] = {}
    arrays = {spec.name: _check_one(spec, inputs[spec.name], manifest.dims, sizes) for spec in specs}
    for name, rows in manifest.table_rows.items():
        ids = arrays[name]
        # onnxruntime counts ids below 0 from the table's end, and OpenVINO takes any: neither says that they are wrong.
        if ids.size and (ids.min() < 0 or ids.max() >= rows):
            raise InputError(
                f"Session.run: input {name}",
                "an id that the model has no embedding for",
                got=f"{ids.min()} to {ids.max()}",
                wanted=f"0 to {rows - 1}",
            )
    return arrays


def _check_one(
    spec: TensorSpec, value: Any, dims: Mapping[str, DimRange], sizes: dict[str, tuple[int, str]]
) -> np.ndarray:
    where = f"Session.run: input {spec.name}"
    if not isinstance(value, np.ndarray | np.generic):
        if not hasattr(value, "__dlpack__"):
            raise InputError(
                where, "neither a numpy array nor a DLPack tensor", got=type(value).__name__, wanted=str(spec)
            )
        try:
            value = np.from_dlpack(value)
        # Each exporter raises its own: for another device, a dtype that numpy lacks, a tensor that wants gradients.
        except (BufferError, RuntimeError, TypeError, ValueError) as e:
            raise InputError(
                where, f"numpy cannot read the DLPack tensor ({e})", got=type(value).__name__, wanted=str(spec)
            ) from e
    value = np.asarray(value)
    if value.dtype.name != spec.dtype:
        raise InputError(
            where,
            "wrong dtype",
            got=value.dtype.name,
            wanted=spec.dtype,
            fix=f"convert it with .astype('{spec.dtype}')",
        )
    if value.ndim != len(spec.shape):
        raise InputError(
            where, "wrong rank", got=f"{value.ndim} (shape {list(value.shape)})", wanted=f"{len(spec.shape)} ({spec})"
        )
    for axis, (size, dim) in enumerate(zip(value.shape, spec.shape)):
        if isinstance(dim, int):
            if size != dim:
                raise InputError(where, f"wrong size of dimension {axis}", got=size, wanted=f"{dim} ({spec})")
            continue
        limits = dims.get(dim, DimRange(0))
        if size < limits.min or (limits.max is not None and size > limits.max):
            raise InputError(
                where,
                f"{dim} (dimension {axis}) is out of range",
                got=size,
                wanted=f"{limits.min} to {limits.max if limits.max is not None else 'any'}",
            )
        first, name = sizes.setdefault(dim, (size, spec.name))
        if first != size:
            raise InputError(where, f"{dim} (dimension {axis}) differs from input {name}'s", got=size, wanted=first)
    # The runtimes read the bytes in the machine's order, whatever the array says.
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def _open_onnxruntime(folder: Path, manifest: Manifest, device: str | None, threads: int | None) -> Session:
    _check_cpu(folder, manifest, device)
    session = open_onnx(folder, manifest, "model", threads)
    decoder = None if manifest.generation is None else OnnxDecoder(session, manifest, manifest.generation)
    encoder = None
    if manifest.encoder is not None:
        apart = manifest.of_encoder
        encoder = Session(folder, apart, onnx_runner(folder, apart, "encoder", threads), "cpu")
    return Session(folder, manifest, runner_of(session, manifest), "cpu", decoder=decoder, encoder=encoder)


def _open_openvino(folder: Path, manifest: Manifest, device: str | None, threads: int | None) -> Session:
    _check_cpu(folder, manifest, device)
    from tilecut_runtime.openvino_runner import openvino_runner

    runner, decoder = openvino_runner(folder, manifest, threads)
    return Session(folder, manifest, runner, "cpu", "openvino", decoder)


def _open_executorch(folder: Path, manifest: Manifest, device: str | None, threads: int | None) -> Session:
    _check_cpu(folder, manifest, device)
    from tilecut_runtime.executorch_runner import executorch_runner

    return Session(folder, manifest, executorch_runner(folder, manifest, threads), "cpu", "executorch")


def _check_cpu(folder: Path, manifest: Manifest, device: str | None) -> None:
    if device not in (None, "cpu"):
        raise ArtifactError(
            str(folder),
            f"an {manifest.target} artifact runs on the CPU",
            got=f"device={device!r}",
            wanted="device=None or 'cpu'",
        )


def onnx_runner(
    folder: Path, manifest: Manifest, entry: str, threads: int | None, rest: bool = False, lean: bool = False
) -> Runner:
    """A runner over onnxruntime's CPU provider for one of the artifact's ONNX files; see `open_onnx`."""
    return runner_of(open_onnx(folder, manifest, entry, threads, rest, lean), manifest)


def open_onnx(
    folder: Path, manifest: Manifest, entry: str, threads: int | None, rest: bool = False, lean: bool = False
) -> onnxruntime.InferenceSession:
    """A session of onnxruntime's CPU provider over one of the artifact's ONNX files, of checked hashes, inputs and outputs.

    Args:
        lean: weights that lie beside the file stay there, mapped into memory: the session makes no copies of them in the
            order that its kernels like, and is slower.
        rest: its threads rest between runs. By default they go on spinning for a while, ready for the next run, on cores
            that something else may be timed on.
    """
    import onnxruntime as ort

    name = manifest.file_of(folder, entry)
    # The model, weights that were split off it because of its size, and weights that two models share.
    manifest.check_files(
        folder,
        [f for f in manifest.files if f == name or f.startswith(name + ".") or f == manifest.entry.get("weights")],
    )
    options = ort.SessionOptions()
    # What it would log as an error it also raises.
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if rest:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
    # onnxruntime's own exception classes share no public base but Exception.
    except Exception as e:
        raise ArtifactError(str(folder / name), f"onnxruntime {ort.__version__} cannot open it: {e}") from e
    for what, specs, found in (
        ("inputs", manifest.inputs, session.get_inputs()),
        ("outputs", manifest.outputs, session.get_outputs()),
    ):
        has, wants = {v.name: len(v.shape) for v in found}, {spec.name: len(spec.shape) for spec in specs}
        if has != wants:
            raise ArtifactError(
                str(folder / name),
                f"the model has other {what} than the manifest says (name: rank)",
                got=has,
                wanted=wants,
                fix="compile it again",
            )
    return session


def runner_of(session: onnxruntime.InferenceSession, manifest: Manifest) -> Runner:
    """A session as a runner of the manifest's outputs."""
    wanted = [spec.name for spec in manifest.outputs]

    def run(arrays: dict[str, np.ndarray]) -> Sequence[Any]:
        try:
            return session.run(wanted, arrays)
        except Exception as e:
            raise refused("onnxruntime", e) from e

    return run


def refused(runtime: str, error: Exception) -> InputError:
    """What a runtime raised on inputs that fit the manifest, in one line."""
    return InputError("Session.run", f"{runtime} cannot run the model on these inputs: {first_line(error)}")


def _open_torch(folder: Path, manifest: Manifest, device: str | None, threads: int | None) -> Session:
    try:
        import torch as _installed
    except ModuleNotFoundError as e:
        raise ArtifactError(
            str(folder),
            f"an artifact for {manifest.target} runs on torch, which is not installed",
            fix="pip install 'tilecut[compile]'",
        ) from e
    assert _installed
    from tilecut_runtime.torch_runner import torch_runner

    runner, device, how = torch_runner(folder, manifest, device, threads)
    return Session(folder, manifest, runner, device, how)


def _open_ascend(folder: Path, manifest: Manifest, device: str | None, threads: int | None) -> Session:
    if device == "reference":
        return Session(folder, manifest, onnx_runner(folder, manifest, "verify", threads), "reference")
    # Imports ais_bench, which is where an NPU is.
    from tilecut_runtime.om_runner import npu_number, om_runner

    number = npu_number(folder, device)
    return Session(folder, manifest, om_runner(folder, manifest, number), f"npu:{number}", "ais_bench")


RUNTIMES: dict[str, Callable[[Path, Manifest, str | None, int | None], Session]] = {
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
    "executorch": _open_executorch,
    "torch": _open_torch,
    "ascend": _open_ascend,
}
