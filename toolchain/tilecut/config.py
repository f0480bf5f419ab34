"""What the caller may ask of a compile: `PruneConfig`, and the presets."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tilecut_passes.score import IMPORTANCES
from tilecut_runtime.errors import ConfigError

KINDS = ("heads", "kv_groups", "queries", "neurons")
AT = {"batch": 1, "sequence": 128, "threads": 1}


class PruneConfig(BaseModel):
    """How much to cut, of what, and how to choose.

    Without any budget, `sparsity` is 0.5. Several budgets hold together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float | None = Field(None, ge=0, lt=1, description="fraction of the prunable MACs that goes")
    max_macs: int | None = Field(None, gt=0, description="multiply-accumulates of the whole model at `at`")
    max_params: int | None = Field(None, gt=0, description="parameters of the whole model")
    max_bytes: int | None = Field(None, gt=0, description="bytes of the whole model's weights")
    attention_sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the attention's MACs that goes, at least"
    )
    at: dict[str, int] = Field(
        default_factory=lambda: dict(AT), description="sizes at which MACs and latency are counted"
    )
    kinds: tuple[str, ...] = Field(KINDS, description="kinds of group that may be cut")
    block: int | None = Field(
        None, gt=0, description="widths are multiples of this and of the target's own block; None: the target's"
    )
    power_of_two_heads: bool | None = Field(None, description="head counts are powers of two; None: the target decides")
    num_heads_keep: int | None = Field(
        None, gt=0, description="heads that every attention keeps; where queries share keys, KV groups"
    )
    method: str = Field("obs", description="importance, see tilecut_passes/score.py")
    reconstruct: bool = Field(True, description="refit the weights behind every gate by least squares")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of every random choice")

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
                "PruneConfig", f"bad {name}", got=repr(first["input"]) if first["loc"] else None, wanted=wanted
            ) from e

    @model_validator(mode="after")
    def _consistent(self) -> PruneConfig:
        if self.method not in IMPORTANCES:
            raise ValueError(f"method {self.method!r} is none of {', '.join(IMPORTANCES)}")
        if unknown := [k for k in self.kinds if k not in KINDS]:
            raise ValueError(f"kind {unknown[0]!r} is none of {', '.join(KINDS)}")
        if not self.kinds:
            raise ValueError("kinds is empty: nothing could be cut")
        if bad := {k: v for k, v in self.at.items() if v < 1}:
            raise ValueError(f"at {bad} must be positive")
        return self

    @property
    def cut_fraction(self) -> float | None:
        """`sparsity`, or its default where no budget is given at all."""
        given = (
            self.sparsity,
            self.max_macs,
            self.max_params,
            self.max_bytes,
            self.attention_sparsity,
            self.num_heads_keep,
        )
        return 0.5 if all(budget is None for budget in given) else self.sparsity

    def sizes(self) -> dict[str, int]:
        """`at` with the defaults filled in."""
        return {**AT, **self.at}


PRESETS = {
    "edge": PruneConfig(sparsity=0.6, block=64),
    "cloud": PruneConfig(sparsity=0.3, block=128),
    "hybrid": PruneConfig(sparsity=0.4, block=128),
}


def find_config(wanted: str | PruneConfig | None) -> PruneConfig | None:
    """A config from a preset's name; None (compile the dense model) and configs are returned as they are.

    Raises:
        ConfigError: no such preset.
    """
    if wanted is None or isinstance(wanted, PruneConfig):
        return wanted
    if not isinstance(wanted, str) or wanted not in PRESETS:
        raise ConfigError(
            "config",
            "unknown preset",
            got=repr(wanted),
            wanted=f"{', '.join(map(repr, PRESETS))}, a PruneConfig or None",
        )
    return PRESETS[wanted]
