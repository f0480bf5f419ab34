"""MACs by hand against MACs from the graph."""

from checks import bert_graph, groups_of, minilm_graph
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter, count_parameters


def by_hand(batch, s, hidden, heads, width, neurons, layers):
    """Projections, scores and mixing, feed-forward, pooler."""
    layer = 4 * s * hidden * heads * width + 2 * s * s * heads * width + 2 * s * hidden * neurons
    return batch * (layers * layer + hidden * hidden)


def counter(graph, **at):
    axes = infer(graph)
    return MacCounter(axes, find_groups(axes), at)


def test_dense_bert():
    assert counter(bert_graph(), batch=3, sequence=17).total() == by_hand(3, 17, 32, 4, 8, 48, 2)


def test_minilm():
    assert counter(minilm_graph(), batch=1, sequence=128).total() == by_hand(1, 128, 384, 12, 32, 1536, 6)


def test_pruned_sizes():
    graph = bert_graph()
    names = [g.name for g in groups_of(graph)]
    counts = {n: (3 if "heads" in n else 20) for n in names}
    assert counter(graph, batch=1, sequence=16).total(counts) == by_hand(1, 16, 32, 3, 8, 20, 2)


def test_prunable_part_leaves_the_pooler_out():
    graph = bert_graph()
    names = [g.name for g in groups_of(graph)]
    count = counter(graph, batch=1, sequence=16)
    assert count.total() - count.of_groups(names) == 32 * 32


def test_groups_that_share_no_contraction_stand_apart():
    graph = bert_graph()
    names = [g.name for g in groups_of(graph)]
    assert counter(graph).groups_together(names) == [[n] for n in names]
    widths = [g.name for g in groups_of(graph, "heads", "vo_width")]
    together = counter(graph).groups_together(widths)
    assert [len(s) for s in together] == [2, 2]


def test_parameters():
    graph = bert_graph()
    assert count_parameters(graph) == sum(t.numel() for t in graph.tensors.values() if t.is_floating_point())
