"""How many tokens an encoder keeps behind each of its layers: the `tokens` of plan.json.

`keep` is a fraction of all tokens that the model was given, padding included: k = ceil(keep * S), at least one. A later
layer never keeps more than an earlier one. The first `first` tokens always stay: classification reads the first one.
Outputs keep their shapes. In the places of removed tokens they hold, as `restored` says, the mean of the row's real tokens
that stayed (a mean over all places is theirs then), or each token's own state, with which it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tilecut_runtime.errors import PlanError

MEAN, OWN = "mean", "own"


@dataclass(frozen=True)
class TokenPlan:
    """Behind the layer called `after`, a fraction `keep` of the tokens stays."""

    after: str
    keep: float
    first: int = 1
    restored: str = MEAN

    @property
    def fraction(self) -> Fraction:
        """`keep` as the decimal number that was written: 0.1 is a tenth."""
        return Fraction(repr(self.keep))

    def count(self, tokens: int) -> int:
        """How many of `tokens` stay."""
        return -(-tokens * self.fraction.numerator // self.fraction.denominator)

    def as_json(self) -> dict[str, Any]:
        """The entry as plan.json writes it."""
        return {"after": self.after, "keep": self.keep, "first": self.first, "restored": self.restored}

    @staticmethod
    def from_json(held: Any) -> TokenPlan:
        """An entry from what `as_json` returned; a KeyError, TypeError or ValueError where it is none."""
        return TokenPlan(
            str(held["after"]), float(held["keep"]), int(held.get("first", 1)), str(held.get("restored", MEAN))
        )


def check_schedule(tokens: Sequence[TokenPlan], where: str = "tokens") -> None:
    """Whether every entry keeps something, and none more than the one before.

    Raises:
        PlanError: it does not.
    """
    least = 1.0
    for one in tokens:
        if not 0 < one.keep <= 1:
            raise PlanError(
                where,
                f"after {one.after} no such part of the tokens can stay",
                got=one.keep,
                wanted="a fraction above 0 and at most 1",
                fix="give at least 1 / (number of tokens) to keep one",
            )
        if one.keep > least:
            raise PlanError(
                where,
                f"after {one.after} more tokens stay than are left",
                got=one.keep,
                wanted=f"at most {least}, what the layer before keeps",
            )
        if one.first < 0:
            raise PlanError(where, f"after {one.after} {one.first} first tokens stay", got=one.first, wanted="0 or more")
        if one.restored not in (MEAN, OWN) or one.restored != tokens[0].restored:
            raise PlanError(
                where,
                f"after {one.after} removed tokens cannot be restored so",
                got=repr(one.restored),
                wanted=f"{MEAN!r} or {OWN!r}, the same behind all layers",
            )
        least = one.keep
    names = [one.after for one in tokens]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PlanError(where, f"{twice[0]} is there twice")
