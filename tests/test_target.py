"""What every target shares: the sizes that search may choose, the passes that enforce them, and rungs."""

import pytest

from checks import bert_graph, groups_of
from tilecut_passes.enforce_block_multiple import EnforceBlockMultiple
from tilecut_passes.enforce_head_width import EnforceHeadWidth
from tilecut_passes.enforce_power_of_two_heads import EnforcePowerOfTwoHeads
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_targets.ascend.target import AscendTarget
from tilecut_targets.cuda.target import CudaTarget
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.target import Target, Written, rung


class Odd(Target):
    """A target that likes blocks of 12 and powers of two."""

    name, runtime, block, head_width, power_of_two_heads = "odd", "onnxruntime", 12, 4, True

    lowering = ()  # type: ignore[assignment]

    def write(self, fused, lowered, folder):
        return Written({})

    def verify(self, folder, manifest, cases):
        return []


@pytest.mark.parametrize(
    ("target", "block", "neurons"),
    [
        (EdgeTarget(), None, 16),
        (EdgeTarget(), 64, 64),
        (EdgeTarget(), 24, 48),
        (EdgeTarget(), 1, 16),
        (CudaTarget(), None, 64),
        (CudaTarget(), 96, 192),
        (AscendTarget(), None, 128),
        (AscendTarget(), 64, 128),
        (Odd(), 16, 48),
    ],
)
def test_a_callers_block_is_combined_with_the_targets_by_least_common_multiple(target, block, neurons):
    lattice = target.lattice(block)
    assert lattice.blocks == {"heads": 1, "kv_groups": 1, "queries": 1, "neurons": neurons, "hidden": neurons}
    assert lattice.sizes("neurons", 3 * neurons + 1) == [neurons, 2 * neurons, 3 * neurons, 3 * neurons + 1]
    assert lattice.sizes("heads", 5) == ([1, 2, 4, 5] if target.power_of_two_heads else [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("target", "asked", "sizes"),
    [
        (EdgeTarget(), None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (EdgeTarget(), True, [1, 2, 4, 8]),
        (Odd(), None, [1, 2, 4, 8]),
        (Odd(), False, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_powers_of_two_are_the_callers_choice_then_the_targets(target, asked, sizes):
    lattice = target.lattice(power_of_two_heads=asked)
    assert lattice.sizes("heads", 8) == lattice.sizes("kv_groups", 8) == sizes
    assert len(lattice.sizes("neurons", 5 * target.block)) == 5


def test_enforce_is_the_targets_rules_in_order():
    assert EdgeTarget().enforce() == (EnforceHeadWidth(multiple=1), EnforceBlockMultiple(block=16))
    assert CudaTarget().enforce() == (EnforceHeadWidth(multiple=8), EnforceBlockMultiple(block=64))
    assert AscendTarget().enforce(True) == (
        EnforceHeadWidth(multiple=16),
        EnforcePowerOfTwoHeads(),
        EnforceBlockMultiple(block=128),
    )
    assert Odd().enforce() == (EnforceHeadWidth(multiple=4), EnforcePowerOfTwoHeads(), EnforceBlockMultiple(block=12))
    assert Odd().enforce(False) == (EnforceHeadWidth(multiple=4), EnforceBlockMultiple(block=12))


def test_enforce_rewrites_nothing_that_the_lattice_offers():
    target = Odd()
    graph = bert_graph()
    plan = PrunePlan.keep_all(graph, groups_of(graph))
    lattice = target.lattice()
    for heads, neurons in ((1, 12), (2, 36), (4, 24)):
        assert lattice.allows("heads", heads, 4) and lattice.allows("neurons", neurons, 48)
        kept = {"heads": range(heads), "neurons": range(neurons)}
        chosen = plan.keeping({g.name: kept[g.kind] for g in plan.groups})
        cut = graph.copy()
        run_passes(cut, [Prune(chosen)])
        for one in target.enforce():
            assert one.on_plan(chosen, graph) == chosen
            assert one(cut) == 0


@pytest.mark.parametrize("target", [EdgeTarget(), CudaTarget(), AscendTarget(), Odd()])
@pytest.mark.parametrize("dense", [1, 48, 100, 129])
def test_the_lattice_knows_what_a_dense_size_is_padded_to(target, dense):
    (block,) = [one for one in target.enforce() if isinstance(one, EnforceBlockMultiple)]
    axes = group = None
    assert target.lattice().emitted("neurons", dense) == block.wanted_size(axes, group, dense)  # type: ignore[arg-type]
    powers = EnforcePowerOfTwoHeads().wanted_size(axes, group, dense)  # type: ignore[arg-type]
    assert target.lattice(power_of_two_heads=True).emitted("heads", dense) == powers
    assert target.lattice(power_of_two_heads=False).emitted("heads", dense) == dense


def test_enforce_brings_another_plan_into_the_lattice():
    target = Odd()
    graph = bert_graph()
    plan = PrunePlan.keep_all(graph, groups_of(graph)).keeping(
        {g.name: range(3) if g.kind == "heads" else range(13) for g in groups_of(graph)}
    )
    for one in target.enforce():
        plan = one.on_plan(plan, graph)
    lattice = target.lattice()
    assert {g.kind: g.padded_to for g in plan.groups} == {"heads": 4, "neurons": 24}
    assert all(lattice.allows(g.kind, g.padded_to or 0, g.size) for g in plan.groups)


@pytest.mark.parametrize(("figure", "status"), [(0.0, "passed"), (1e-4, "passed"), (1.1e-4, "failed")])
def test_a_rung_passes_up_to_its_limit(figure, status):
    made = rung("equal", figure, 1e-4, "against torch")
    assert (made.name, made.status, made.detail, made.figure, made.limit) == (
        "equal",
        status,
        "against torch",
        figure,
        1e-4,
    )


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_rung_without_a_finite_figure_fails(figure):
    assert rung("equal", figure, 1e-4, "").status == "failed"


def test_a_target_is_named_with_its_chip():
    assert str(AscendTarget("Ascend910B2")) == "ascend:Ascend910B2"
    assert str(EdgeTarget()) == "edge"


def test_a_target_that_cannot_run_here_has_no_contenders(tmp_path):
    assert CudaTarget().contenders(bert_graph(), tmp_path, None, 1, tmp_path) is None  # type: ignore[arg-type]


def test_a_target_says_how_it_lowers_writes_and_verifies():
    with pytest.raises(TypeError, match="abstract"):
        Target()  # type: ignore[abstract]
