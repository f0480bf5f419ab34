"""The base of what a caller may set: frozen fields, each with a description, and one clear error for a bad one."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tilecut_runtime.errors import ConfigError


class Settings(BaseModel):
    """Fields that are checked when they are given, and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **given: Any):
        try:
            super().__init__(**given)
        except ValidationError as e:
            first = e.errors()[0]
            name = ".".join(map(str, first["loc"])) or "value"
            wanted = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                wanted = f"one of {', '.join(type(self).model_fields)}"
            raise ConfigError(
                type(self).__name__, f"bad {name}", got=repr(first["input"]) if first["loc"] else None, wanted=wanted
            ) from e
