"""The class of outputs that a model of transformers returns, found by the annotation of its `forward`."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Collection
from typing import Any

from transformers.utils.generic import ModelOutput


def original_output(model_class: type, names: Collection[str]) -> type[ModelOutput]:
    """The annotated class that has a field for every output and a loss; else one that is made of the names.

    Args:
        names: what the pruned graph returns.
    """
    for cls in _annotated(inspect.unwrap(model_class.forward)):  # type: ignore[attr-defined]
        if set(names) <= {field.name for field in dataclasses.fields(cls)}:  # pyright: ignore[reportArgumentType]
            return cls
    fields = [(name, Any, None) for name in dict.fromkeys(("loss", *names))]
    return dataclasses.make_dataclass("PrunedOutput", fields, bases=(ModelOutput,))


def _annotated(forward: Any) -> list[type[ModelOutput]]:
    """The classes of outputs in the annotation of what `forward` returns."""
    try:
        found = typing.get_type_hints(forward).get("return")
    # An annotation in quotes that names what is imported for type checkers alone.
    except NameError:
        return []
    options = typing.get_args(found) or (found,)
    return [cls for cls in options if isinstance(cls, type) and issubclass(cls, ModelOutput)]
