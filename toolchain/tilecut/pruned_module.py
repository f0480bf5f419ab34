"""The pruned model as a PyTorch module: what `Artifact.module()` returns."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from tilecut_passes.unlift_program import unlift_program
from tilecut_runtime.manifest import Manifest


class Outputs(dict):
    """Outputs by name, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as e:
            raise AttributeError(name) from e


def _with_keys(held: Any) -> tuple[list[Any], list[str]]:
    return [(pytree.MappingKey(k), v) for k, v in held.items()], list(held)


# torch.export asks for this of what forward returns: a trained module can be compiled again.
pytree.register_pytree_node(
    Outputs,
    lambda held: (list(held.values()), list(held)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    flatten_with_keys_fn=_with_keys,
)


class PrunedModule(nn.Module):
    """Runs the captured graph; parameters carry the names of the original model's `state_dict`."""

    def __init__(self, program: ExportedProgram, manifest: Manifest):
        super().__init__()
        self._returns, self._outputs = manifest.returns, tuple(spec.name for spec in manifest.outputs)
        self._inputs = tuple(spec.name for spec in manifest.inputs)
        module = unlift_program(program, manifest.model).module
        # The graph's own tensors and code become this module's, so that their names need no prefix.
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in module._modules.items():
            self.add_module(name, child)
        self._code = type(module).forward

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the model; inputs by position in the manifest's order, or by name."""
        given = {**dict(zip(self._inputs, args)), **kwargs}
        missing = [name for name in self._inputs if name not in given]
        if missing or len(given) != len(self._inputs):
            raise TypeError(f"the model takes {', '.join(self._inputs)}; got {', '.join(given) or 'nothing'}")
        values = self._code(self, *(given[name] for name in self._inputs))
        if self._returns == "tensor":
            return values[0]
        return tuple(values) if self._returns == "tuple" else Outputs(zip(self._outputs, values, strict=True))
