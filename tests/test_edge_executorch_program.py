"""target="edge:executorch": a program whose products run in XNNPACK, with planned memory for bounded sizes."""

import pytest
import torch

from checks import bert_graph, emit, encoder_graph, text_batch
from tilecut_runtime.errors import ArtifactError, InputError, LoweringError
from tilecut_runtime.executorch_runner import open_executorch
from tilecut_runtime.session import load
from tilecut_targets.edge.executorch_program import ExecuTorchTarget

TARGET = ExecuTorchTarget()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return emit(TARGET, encoder_graph(), tmp_path_factory.mktemp("executorch") / "a")


def batch(rows, length, seed=0):
    inputs = text_batch(rows, length, seed, vocab=50)
    return {k: inputs[k].numpy() for k in ("input_ids", "attention_mask")}


def test_every_product_and_softmax_runs_in_xnnpack(made):
    ops = made.written.facts["ops"]
    outside = {op for op in ops if not op.startswith("xnnpack ")}
    assert ops["xnnpack _softmax"] == 2 and ops["xnnpack bmm"] == 4 and ops["xnnpack linear"] == 12
    assert not outside & {"mm", "bmm", "addmm", "linear", "_softmax", "gelu"}
    assert not any("sdpa" in op or "scaled_dot_product" in op for op in ops)


@pytest.mark.parametrize(
    ("at", "example", "bounds"),
    [
        ({}, {}, {"batch": (1, 8), "sequence": (1, 512)}),
        ({"batch": 20, "sequence": 8}, {}, {"batch": (1, 20), "sequence": (1, 512)}),
        ({}, {"batch": 12}, {"batch": (1, 12), "sequence": (1, 512)}),
    ],
)
def test_sizes_are_bounded_by_default_and_raised_by_what_is_asked_for(at, example, bounds):
    graph = bert_graph().copy()
    graph.example_sizes = example
    assert {name: (r.min, r.max) for name, r in TARGET.ranges(graph, at).items()} == bounds


def test_beyond_the_bound_is_one_error(made):
    session = load(made.folder)
    assert session.run(batch(8, 5))["hidden"].shape == (8, 5, 24)
    with pytest.raises(InputError, match=r"batch \(dimension 0\) is out of range; got 9; wanted 1 to 8"):
        session.run(batch(9, 5))


def test_results_outlive_the_next_run(made):
    run = open_executorch(made.folder / "model.pte", ["input_ids", "attention_mask"], 1)
    first = run(batch(2, 5, seed=1))[0]
    kept = first.copy()
    run(batch(2, 5, seed=2))
    assert (first == kept).all()


def test_threads_size_the_pool_of_the_process(made):
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    for threads in (2, 1):
        load(made.folder, threads=threads)
        assert _threadpool_get_thread_count() == threads


def test_programs_that_are_open_together_share_the_number_of_threads(made):
    held = load(made.folder, threads=1)
    given = batch(2, 5, seed=1)
    with pytest.raises(ArtifactError, match="one pool of threads for a process.*got threads=2; wanted threads=1"):
        load(made.folder, threads=2)
    before = held.run(given)
    # The same number, or no wish, is no trouble.
    again = [load(made.folder, threads=1), load(made.folder)]
    for one in again:
        assert all((one.run(given)[name] == before[name]).all() for name in before)


class Sorts(torch.nn.Module):
    """A model of an op that ExecuTorch has no kernel for."""

    def forward(self, x):
        return torch.linalg.eigvalsh(x)


def test_an_op_without_a_kernel_is_one_error(tmp_path):
    from tilecut_passes.capture import capture

    graph = capture(Sorts(), {"x": torch.randn(3, 4, 4)}, {})
    with pytest.raises(LoweringError, match="executorch refused the model"):
        TARGET.emit(graph, tmp_path)
