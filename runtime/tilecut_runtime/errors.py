"""The errors that tilecut raises: each says where, what is wrong, what it got, what it wanted and what to do."""

from __future__ import annotations

import functools


class TilecutError(Exception):
    """Base of every error that tilecut raises on purpose.

    Args:
        where: the component, pass, file or field that found the fault.
        problem: what is wrong, one clause.
        got: what was found.
        wanted: what would have been right.
        fix: what the reader can do about it.
    """

    def __init__(self, where: str, problem: str, *, got: object = None, wanted: object = None, fix: str | None = None):
        self.where, self.problem, self.got, self.wanted, self.fix = where, problem, got, wanted, fix
        text = f"{where}: {problem}"
        if got is not None:
            text += f"; got {got}"
        if wanted is not None:
            text += f"; wanted {wanted}"
        if fix:
            text += f"; {fix}"
        super().__init__(text)

    def __reduce__(self):
        # An exception is pickled by its message alone, and a worker's could not be raised again by its parent.
        make = functools.partial(type(self), got=self.got, wanted=self.wanted, fix=self.fix)
        return make, (self.where, self.problem)


class ConfigError(TilecutError, ValueError):
    """A setting, budget or target that cannot be honoured."""


class CaptureError(TilecutError):
    """The model cannot be exported to a graph."""


class CalibrationError(TilecutError, ValueError):
    """Calibration data that is missing, empty or does not fit the model."""


class PlanError(TilecutError, ValueError):
    """A prune plan that does not belong to this graph, or is malformed."""


class RecoveryError(TilecutError):
    """Training after the cut that diverged, or that cannot reach what was asked of it."""


class LoweringError(TilecutError):
    """A graph that the target cannot express."""


class VerificationError(TilecutError):
    """A result that differs from its reference by more than the stated limit."""


class ArtifactError(TilecutError):
    """An artifact that is missing, altered, truncated or of another format."""


class InputError(TilecutError, ValueError):
    """Inputs that do not fit the session: name, dtype, rank or size."""


def first_line(error: BaseException | None, limit: int = 300) -> str:
    """An exception's type and the first line of its message: what one line of ours can quote of another library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with the place in its sources.
    lines = [line for line in lines if not line.startswith("Exception from ")] or lines
    return f"{type(error).__name__}: {lines[0][:limit] if lines else 'no message'}"
