"""Errors: one line that says where, what, got, wanted and what to do, and that survives a process boundary."""

import copy
import pickle

import pytest

from tilecut_runtime import errors
from tilecut_runtime.errors import ArtifactError, ConfigError, InputError, LoweringError, TilecutError

KINDS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, TilecutError)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "load: no such file"),
        ({"got": 3}, "load: no such file; got 3"),
        ({"wanted": "a folder"}, "load: no such file; wanted a folder"),
        ({"fix": "look again"}, "load: no such file; look again"),
        ({"got": 3, "wanted": 4, "fix": "count"}, "load: no such file; got 3; wanted 4; count"),
        ({"got": 0, "wanted": False}, "load: no such file; got 0; wanted False"),
    ],
)
def test_the_message_holds_what_is_known(options, message):
    assert str(TilecutError("load", "no such file", **options)) == message


def test_the_parts_stay_readable_apart():
    error = ConfigError("search", "too small", got=1, wanted=2, fix="raise it")
    assert (error.where, error.problem, error.got, error.wanted, error.fix) == ("search", "too small", 1, 2, "raise it")


def test_every_error_is_a_tilecut_error_and_bad_values_are_value_errors_too():
    assert len(KINDS) == 10
    assert {e.__name__ for e in KINDS if issubclass(e, ValueError)} == {
        "ConfigError",
        "CalibrationError",
        "PlanError",
        "InputError",
    }


@pytest.mark.parametrize("kind", [InputError, ArtifactError, LoweringError])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_of_a_worker_process_arrives_whole(kind, again):
    error = kind("run", "wrong dtype", got="int32", wanted="int64", fix="convert it")
    made = again(error)
    assert type(made) is kind
    assert str(made) == str(error) == "run: wrong dtype; got int32; wanted int64; convert it"
    assert made.wanted == "int64"
