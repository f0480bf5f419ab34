"""A pruned model as a `PreTrainedModel` of its original class: what `Artifact.hf_model()` and `from_pretrained` return.

The class is made from the original one (`BertModel` -> a subclass of the same name), so that pipelines, `generate` and
`Trainer` know it; what runs is the captured pruned graph, whatever its layers' sizes are. Parameters carry the names of
the original `state_dict`.

Same as the original:    forward's signature and output class, labels and loss, return_dict, generate, config
Refused, in one line:    what the graph was captured without: inputs_embeds, hidden states, attentions, a head mask
Left out:                dropout (captured in eval mode)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate
from transformers import DynamicCache, PreTrainedModel

from tilecut.align_left import left_padding, roll
from tilecut.original_loss import LABELS, original_loss
from tilecut.original_output import original_output
from tilecut.read_later import ReadLater, Unread
from tilecut.save_pretrained import save_pretrained
from tilecut_passes.axes.rules_convolutions import CONVOLUTIONS
from tilecut_passes.flat_forward import PAST, PRESENT, flatten_cache
from tilecut_passes.graph import arguments, is_call
from tilecut_passes.unlift_program import unlift_program
from tilecut_runtime.errors import InputError
from tilecut_runtime.manifest import TensorSpec

# Neither inputs of the graph nor labels; what they ask for is done here, or they ask for what the graph does anyway.
HANDLED = ("return_dict", "use_cache", "logits_to_keep", "num_items_in_batch", "cache_position", "position_ids")


@dataclass(frozen=True)
class Source:
    """What a pruned model is made of, apart from its weights: what `save_pretrained` writes again.

    `program` and `plan` are the contents of module.pt2 and plan.json, `rotations` of the plan's rotations.safetensors.
    """

    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    program: bytes
    plan: bytes
    rotations: bytes | None = None


class PrunedPretrained:
    """What runs a graph in place of the original's layers; `pruned_class` puts it before the original class."""

    # Of the class beside it.
    config: Any
    generation_config: Any
    original: type[Any]

    def __init__(self, config: Any, source: Source, program: ExportedProgram):
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        module = unlift_program(program, source.model).module
        self._source, self._graph = source, module.graph
        for held, add in (
            (module._parameters, self.register_parameter),
            (module._buffers, self.register_buffer),
            (module._modules, self.add_module),
        ):
            for name, value in held.items():
                add(name, value)
        self._code = type(module).forward
        self._graph_device = self._held_device()
        self._has_cache = any(spec.name.startswith(f"{PAST}_") for spec in source.inputs)
        names = [spec.name for spec in source.outputs if not spec.name.startswith(f"{PRESENT}_")]
        self._output_class = original_output(self.original, [*names, *([PAST] if self._has_cache else [])])
        if "encoder" in self._modules:
            # It holds tensors alone; generation asks for this name.
            self.encoder.main_input_name = self.original.main_input_name
        for node in self._graph.nodes:
            if is_call(node, *CONVOLUTIONS) and (weight := arguments(node)["weight"]).op == "get_attr":
                # Whisper's generation asks how far its convolutions step.
                layer: Any = self.get_submodule(weight.target.rpartition(".")[0])
                layer.stride = tuple(arguments(node)["stride"])
        # Tied weights are one tensor in the graph.
        self.all_tied_weights_keys: dict[str, str] = {}
        if not self._has_cache:
            self.config.use_cache = False
            if self.can_generate():
                self.generation_config.use_cache = False
        self.eval()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _held_device(self) -> torch.device:
        return next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the tensors, and make what the graph itself makes (positions, masks) on the new device."""
        moved = PreTrainedModel._apply(self, *args, **kwargs)  # type: ignore[arg-type]
        device = self._held_device()
        if device != self._graph_device:
            there = lambda value: device if isinstance(value, torch.device) else value
            for node in self._graph.nodes:
                if node.op == "call_function":
                    node.args = map_aggregate(node.args, there)  # type: ignore[assignment]
                    node.kwargs = map_aggregate(node.kwargs, there)  # type: ignore[assignment]
            self._code = type(fx.GraphModule(self, self._graph)).forward  # type: ignore[arg-type]
            self._graph_device = device
        return moved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward: its arguments by name or position, its class of outputs."""
        given = self._named(args, kwargs)
        cache = given.pop(PAST, None)
        if isinstance(given.get("encoder_outputs"), Unread):
            given[self.original.main_input_name] = given.pop("encoder_outputs").last_hidden_state
        labels = {name: given.pop(name) for name in LABELS if name in given}
        options = {name: given.pop(name) for name in HANDLED if name in given and name not in self._input_names()}
        if "labels" in labels:
            self._decoder_inputs(given, labels["labels"])
        values = self._run(given, cache, options)
        if keep := options.get("logits_to_keep"):
            chosen = slice(-keep, None) if isinstance(keep, int) else keep
            values["logits"] = values["logits"][:, chosen]
        outputs: dict[str, Any] = {}
        if labels:
            passed = {k: options[k] for k in ("num_items_in_batch",) if k in options}
            outputs["loss"] = original_loss(self, values, labels, passed)
        outputs |= {name: value for name, value in values.items() if not name.startswith(f"{PRESENT}_")}
        if self._has_cache and options.get("use_cache", True):
            outputs[PAST] = self._cache_of(values)
        made = self._output_class(**outputs)
        as_dict = options.get("return_dict", self.config.return_dict)
        return made if as_dict else made.to_tuple()

    def _input_names(self) -> list[str]:
        return [spec.name for spec in self._source.inputs]

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What was given, by name; None and False count as not given."""
        places = list(inspect.signature(self.original.forward).parameters)[1:]
        given = {**dict(zip(places, args)), **kwargs}
        return {
            name: value
            for name, value in given.items()
            if value is not None and (value is not False or name in HANDLED)
        }

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """What generation runs first: the graph reads what goes into its encoder in every step."""
        if self.config.is_encoder_decoder and "encoder_outputs" not in self._input_names():
            return ReadLater(self.original.main_input_name)
        return self.original.get_encoder(self, *args, **kwargs)

    def _decoder_inputs(self, given: dict[str, Any], labels: Tensor) -> None:
        """An encoder-decoder reads its labels, shifted, where it is given nothing else to read."""
        wanted, shift = "decoder_input_ids", "prepare_decoder_input_ids_from_labels"
        if wanted in self._input_names() and wanted not in given and hasattr(self, shift):
            given[wanted] = self.prepare_decoder_input_ids_from_labels(labels=labels)

    def _run(self, given: dict[str, Any], cache: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's outputs by name."""
        values = self._complete(given, cache)
        shift = self._shift(values, options.get("position_ids"))
        rows = {spec.name: spec for spec in (*self._source.inputs, *self._source.outputs)}
        sequence = rows[self.original.main_input_name].shape[1] if shift is not None else None
        turned = lambda name: shift is not None and len(rows[name].shape) > 1 and rows[name].shape[1] == sequence
        inputs = [roll(v, shift) if turned(k) else v for k, v in values.items()]  # type: ignore[arg-type]
        out = dict(zip((spec.name for spec in self._source.outputs), self._code(self, *inputs), strict=True))
        return {k: roll(v, -shift) if turned(k) else v for k, v in out.items()}  # type: ignore[operator]

    def _complete(self, given: dict[str, Any], cache: Any) -> dict[str, Tensor]:
        """A tensor for every input of the graph, in order.

        Raises:
            InputError: an input is missing, or one is given that the graph was captured without.
        """
        where = type(self).__name__
        if cache is not None and not self._has_cache and cache.get_seq_length() > 0:
            raise InputError(
                where,
                "the pruned model was captured without a key-value cache",
                got=PAST,
                fix="generate with use_cache=False, or compile with example_inputs=inputs_with_cache(model)",
            )
        past = (
            {f"{PAST}_{k}": v for k, v in flatten_cache(cache).items()} if cache is not None and self._has_cache else {}
        )
        names = self._input_names()
        rest = {name: value for name, value in given.items() if name not in names and not self._is_neutral(name, value)}
        if rest:
            raise InputError(
                where,
                f"the pruned model was captured without {', '.join(rest)}",
                wanted=", ".join(name for name in names if not name.startswith(f"{PAST}_")),
                fix="leave it out, or compile with it among the example inputs",
            )
        values: dict[str, Tensor] = {}
        for spec in self._source.inputs:
            value = past.get(spec.name, given.get(spec.name))
            value = self._default(spec, given, past) if value is None else value
            integral = not value.is_floating_point() and "float" not in spec.dtype
            values[spec.name] = value.to(getattr(torch, spec.dtype)) if integral else value
        return values

    def _is_neutral(self, name: str, value: Any) -> bool:
        """Whether an input that the graph lacks says nothing: a mask that hides nothing, types of a model without types."""
        if not isinstance(value, Tensor):
            return False
        if name.endswith("attention_mask"):
            return bool((value == 1).all())
        return name == "token_type_ids" and getattr(self.config, "type_vocab_size", 2) <= 1 and not bool(value.any())

    def _default(self, spec: TensorSpec, given: Mapping[str, Any], past: Mapping[str, Tensor]) -> Tensor:
        """What an input is that was not given, as the original makes it up."""
        ids = given.get("decoder_input_ids" if spec.name.startswith("decoder_") else self.original.main_input_name)
        if spec.name.startswith(f"{PAST}_") and ids is not None:
            rows, heads, _, width = spec.shape
            assert isinstance(rows, str) and isinstance(heads, int) and isinstance(width, int)
            return torch.zeros(len(ids), heads, 0, width, device=ids.device, dtype=self.dtype)
        if ids is not None and spec.name.endswith("attention_mask") and len(spec.shape) == 2:
            before = max((v.shape[2] for v in past.values()), default=0)
            return torch.ones(len(ids), before + ids.shape[1], device=ids.device, dtype=torch.long)
        if ids is not None and spec.name == "token_type_ids":
            return torch.zeros_like(ids)
        raise InputError(
            type(self).__name__, "missing input", got=", ".join(given) or "nothing", wanted=f"{spec.name} as well"
        )

    def _shift(self, values: Mapping[str, Tensor], positions: Any) -> Tensor | None:
        """How far rows move to the left, [B]; None where nothing is padded on its left.

        Raises:
            InputError: positions that the graph does not count in.
        """
        ids = values.get("input_ids")
        if positions is None or ids is None or "position_ids" in values:
            return None
        mask = values.get("attention_mask", torch.ones_like(ids))
        if self._has_cache and mask.shape[1] != ids.shape[1]:
            fits = bool((mask != 0).all()) and bool(
                (positions == positions[..., :1] + torch.arange(ids.shape[1], device=ids.device)).all()
            )
            found = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if fits else None
        else:
            found = left_padding(mask, positions)
        if found is None or (self._has_cache and bool(found.any())):
            raise InputError(
                type(self).__name__,
                "the pruned model was captured without position_ids, and these are not those that it counts itself",
                wanted="0, 1, 2, .. from the first token that is not padding, without a cache from the left edge",
                fix="leave position_ids out, or compile with them among the example inputs",
            )
        return found if bool(found.any()) else None

    def _cache_of(self, values: Mapping[str, Tensor]) -> DynamicCache:
        """The outputs that are keys and values, as the cache that transformers' generation takes."""
        held = iter([value for name, value in values.items() if name.startswith(f"{PRESENT}_")])
        return DynamicCache(ddp_cache_data=list(zip(held, held)))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; without a cache in the graph every step reads the whole text again."""
        if not self._has_cache:
            kwargs["use_cache"] = False
        elif kwargs.get("use_cache", True) and kwargs.get(PAST) is None:
            # One that keeps everything, whatever windows the config asks for: the graph's own mask applies them.
            kwargs[PAST] = DynamicCache()
        return self.original.generate(self, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **unused: Any
    ) -> None:
        """Write model.safetensors, config.json, plan.json and module.pt2; `tilecut.from_pretrained` reads them."""
        if is_main_process:
            save_pretrained(self, self._source, Path(save_directory), state_dict)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        """What `save_pretrained` wrote; the same as `tilecut.from_pretrained`."""
        from tilecut.pretrained import from_pretrained

        return from_pretrained(folder)


def pruned_class(original: type[Any]) -> type[Any]:
    """A subclass of a model class of transformers, under its name, whose layers are a graph."""
    body = {"original": original, "__module__": __name__, "__doc__": f"A pruned {original.__name__}."}
    made = type(original.__name__, (PrunedPretrained, original), body)
    forward = lambda self, *args, **kwargs: PrunedPretrained.forward(self, *args, **kwargs)
    # Pipelines, generate and the Trainer look at what forward takes.
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    made.forward = forward
    return made
