"""Moving a graph: nothing is shared, and everything that it makes is made there."""

import torch

from checks import bert_graph, text_batch
from tilecut_passes.move_graph import move_graph


def test_a_copy_of_its_own_that_gives_the_same():
    graph = bert_graph()
    moved = move_graph(graph, torch.device("cpu"))
    inputs = text_batch(2, 9)
    want, got = graph.run(inputs), moved.run(inputs)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert {name: type(t) for name, t in moved.tensors.items()} == {name: type(t) for name, t in graph.tensors.items()}
    held = {t.data_ptr() for t in graph.tensors.values()}
    assert not held & {t.data_ptr() for t in moved.tensors.values()}


def test_all_of_it_is_on_the_other_device():
    graph = bert_graph()
    named = [a for n in graph.nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, torch.device)]
    assert named, "the graph makes nothing: this would test nothing"
    meta = torch.device("meta")
    out = move_graph(graph, meta).run({k: v.to(meta) for k, v in text_batch(2, 9).items()})
    assert {v.device.type for v in out.values()} == {"meta"}
    assert {t.device.type for t in graph.tensors.values()} == {"cpu"}
