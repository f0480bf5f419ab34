"""What the caller may ask of a compile: `PruneConfig`, and the presets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tilecut.mix_texts import MIXTURE
from tilecut.recovery_config import Recovery
from tilecut.settings import Settings
from tilecut_passes.score import IMPORTANCES
from tilecut_runtime.errors import ConfigError

# What is cut unless something else is asked for, and what else may be (docs/kinds.md).
DEFAULT_KINDS = ("heads", "kv_groups", "queries", "neurons")
# Kinds whose units have gates with a gradient each, which the method of Kwon et al. ranks; of a vocabulary nothing is ranked.
GATED_KINDS = (*DEFAULT_KINDS, "experts", "vocab")
KINDS = (*DEFAULT_KINDS, "qk_width", "vo_width", "hidden", "layers", "experts", "vocab")
METHODS = tuple(dict.fromkeys(("table", "fisher", *IMPORTANCES)))
AT = {"batch": 1, "sequence": 128, "threads": 1}


class PruneConfig(Settings):
    """How much to cut, of what, and how to choose.

    Without any budget, `sparsity` is 0.5. Several budgets hold together.
    """

    sparsity: float | None = Field(default=None, ge=0, lt=1, description="fraction of the prunable MACs that goes")
    max_macs: int | None = Field(default=None, gt=0, description="multiply-accumulates of the whole model at `at`")
    max_params: int | None = Field(default=None, gt=0, description="parameters of the whole model")
    max_bytes: int | None = Field(default=None, gt=0, description="bytes of the whole model's weights")
    max_latency_ms: float | None = Field(
        default=None, gt=0, description="milliseconds of one run at `at`, by the target's cost model (measured on this machine)"
    )
    attention_sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="fraction of the attention's MACs that goes, at least"
    )
    at: dict[str, int] = Field(
        default_factory=lambda: dict(AT), description="sizes at which MACs and latency are counted"
    )
    kinds: tuple[str, ...] = Field(default=DEFAULT_KINDS, description="kinds of group that may be cut, of " + ", ".join(KINDS))
    vocabulary: str | tuple[int, ...] | tuple[str, ...] | None = Field(
        default=None,
        description="with kind vocab, the words that stay: those of a file of texts (.txt, .tsv, .jsonl) or of texts, or "
        "ids; special tokens always do",
    )
    block: int | None = Field(
        default=None, gt=0, description="widths are multiples of this and of the target's own block; None: the target's"
    )
    power_of_two_heads: bool | None = Field(default=None, description="head counts are powers of two; None: the target decides")
    num_heads_keep: int | None = Field(
        default=None, gt=0, description="heads that every attention keeps; where queries share keys, KV groups"
    )
    keep: tuple[str, ...] = Field(default=(), description="groups that are not cut: names, or patterns such as '*layer.0.*'")
    min_units: dict[str, int] = Field(
        default_factory=dict, description="fewest units that a group keeps, by kind, name or pattern"
    )
    max_units: dict[str, int] = Field(
        default_factory=dict, description="most units that a group keeps, by kind, name or pattern"
    )
    rotate: bool = Field(
        default=True,
        description="cut the hidden width along its principal components on the calibration data, where the model's norms "
        "allow it; channels as they are elsewhere",
    )
    uniform: bool = Field(default=False, description="groups of one kind and dense size keep equally many units")
    adapt_block: float | None = Field(
        default=None,
        ge=0,
        description="take the largest block of 256, 128, .., 16 whose predicted loss exceeds that of the target's own "
        "block by no more than this fraction",
    )
    method: str = Field(
        default="table",
        description="table (measured costs of every size), fisher (the whole method of Kwon et al.), or the name of an "
        "importance whose losses are traded as they are",
    )
    importance: str = Field(default="obs", description="the order in which units go, for method='table'")
    outputs: tuple[str, ...] | None = Field(
        default=None, description="outputs that count in the cost table and in recovery; None: every floating one"
    )
    reconstruct: bool = Field(default=True, description="refit weights in closed form; method='fisher' tunes its masks instead")
    finetune: Recovery | None = Field(
        default=None, description="training after the cut, label-free or with labels; None: closed-form repair alone"
    )
    quantize: str | None = Field(
        default=None,
        description="what the target does to the written model last: on edge int8, int8-static, int4, int4:128 or fp16; "
        "docs/quantization.md says which its runtimes have",
    )
    mixture: float = Field(
        default=MIXTURE, ge=0, lt=1, description="fraction of the calibration tokens that is of the general text tilecut ships"
    )
    tokens: dict[int | str, float] | Literal["search"] | None = Field(
        default=None,
        description="fraction of an encoder's tokens that stays behind a layer, by the layer's number, name or pattern; "
        "'search' finds them within the budget, with method='table'; None removes none",
    )
    tokens_restored: Literal["mean", "own"] = Field(
        default="mean",
        description="what outputs hold in the places of removed tokens: the mean of those that stayed, so that mean pooling "
        "is theirs, or each token's own state, with which it left",
    )
    cache: str | None = Field(
        default=None, description="folder of cost tables; None: TILECUT_CACHE, else ~/.cache/tilecut; '' keeps none"
    )
    offload: str | None = Field(
        default=None, description="folder for weights and activations while compiling, for models larger than memory"
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="of every random choice")

    @model_validator(mode="after")
    def _consistent(self) -> PruneConfig:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"importance {self.importance!r} is none of {', '.join(IMPORTANCES)}")
        if self.adapt_block is not None and self.block is not None:
            raise ValueError("adapt_block chooses the block: leave block out")
        if unknown := [k for k in self.kinds if k not in KINDS]:
            raise ValueError(f"kind {unknown[0]!r} is none of {', '.join(KINDS)}")
        if self.method == "fisher" and (odd := [k for k in self.kinds if k not in GATED_KINDS]):
            raise ValueError(f"method 'fisher' (Kwon et al.) knows no {odd[0]}: use method='table'")
        if not self.kinds:
            raise ValueError("kinds is empty: nothing could be cut")
        if ("vocab" in self.kinds) != (self.vocabulary is not None):
            raise ValueError("kind 'vocab' and vocabulary, which says what words stay, go together")
        if self.vocabulary is not None and not self.vocabulary:
            raise ValueError("vocabulary is empty: no word would stay")
        if bad := {k: v for k, v in self.at.items() if v < 1}:
            raise ValueError(f"at {bad} must be positive")
        if isinstance(self.tokens, dict) and (none := {k: v for k, v in self.tokens.items() if not 0 < v <= 1}):
            raise ValueError(f"tokens {none}: what stays is a fraction above 0 and at most 1 (1 / sequence keeps one token)")
        return self

    @property
    def cut_fraction(self) -> float | None:
        """`sparsity`, or its default where no budget is given at all."""
        given = (
            self.sparsity,
            self.max_macs,
            self.max_params,
            self.max_bytes,
            self.max_latency_ms,
            self.attention_sparsity,
            self.num_heads_keep,
        )
        return 0.5 if all(budget is None for budget in given) else self.sparsity

    @property
    def cache_folder(self) -> Path | None:
        """Where cost tables are kept, or None."""
        if self.cache is not None:
            return Path(self.cache) if self.cache else None
        return Path(os.environ.get("TILECUT_CACHE") or Path.home() / ".cache" / "tilecut")

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
