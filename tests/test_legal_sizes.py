import pytest

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.groups import Group
from tilecut_passes.legal_sizes import Constraints, alike, fits, legal_sizes
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError


def group(name, kind, size):
    return Group(name, kind, size, Axis(size), (), ())


GROUPS = [
    group("layer.0.attention:heads", "heads", 4),
    group("layer.0:neurons", "neurons", 64),
    group("layer.1:neurons", "neurons", 64),
    group("layer.2:neurons", "neurons", 50),
]
LATTICE = Lattice({"neurons": 16})


def sizes(**asked):
    return legal_sizes(GROUPS, LATTICE, Constraints(**asked))


def test_without_constraints_the_lattice_decides():
    assert sizes() == {g.name: LATTICE.sizes(g.kind, g.size) for g in GROUPS}


def test_groups_are_named_by_kind_name_or_pattern():
    assert fits(GROUPS[1], "neurons") and fits(GROUPS[1], "layer.0:neurons") and fits(GROUPS[1], "*layer.0*")
    assert not fits(GROUPS[1], "heads") and not fits(GROUPS[1], "layer.0")


def test_what_is_kept_has_its_dense_size():
    held = sizes(keep=["layer.0*"])
    assert held["layer.0.attention:heads"] == [4] and held["layer.0:neurons"] == [64]
    assert held["layer.1:neurons"] == [16, 32, 48, 64]


def test_bounds_narrow_and_the_later_entry_wins():
    held = sizes(least={"neurons": 32, "layer.1:neurons": 48}, most={"neurons": 48})
    assert held["layer.0:neurons"] == [32, 48] and held["layer.1:neurons"] == [48]
    assert held["layer.2:neurons"] == [32, 48]


def test_a_given_size_is_the_only_one():
    assert sizes(fixed={"layer.0.attention:heads": 3})["layer.0.attention:heads"] == [3]


def test_alike_are_groups_of_one_kind_and_size_that_may_be_cut():
    assert alike(GROUPS, Constraints()) == []
    assert alike(GROUPS, Constraints(uniform=True)) == [["layer.0:neurons", "layer.1:neurons"]]
    assert alike(GROUPS, Constraints(uniform=True, keep=("layer.1:neurons",))) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": ["layer.9*"]}, r"keep names no group that may be cut; got 'layer\.9\*'; wanted a kind \(heads, neurons"),
        ({"least": {"experts": 2}}, "min_units names no group"),
        ({"most": {"head": 2}}, "max_units names no group"),
        ({"least": {"neurons": 33}, "most": {"neurons": 47}}, "layer.0:neurons has no legal size from 33 to 47; wanted bounds"),
        ({"fixed": {"layer.0.attention:heads": 5}}, "num_heads_keep does not fit .*; got 5; wanted one of 1, 2, 3, 4"),
    ],
)
def test_what_cannot_be_is_one_clear_error(asked, message):
    with pytest.raises(ConfigError, match=message):
        sizes(**asked)
