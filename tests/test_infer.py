"""What inference finds in real graphs, and that it freezes what it does not know."""

import torch
from torch import nn

from checks import bert_graph, groups_of, randomise, tiny_bert
from tilecut_passes.axes.groups import find_frozen, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture


def test_every_op_of_bert_has_a_rule():
    for attn in ("sdpa", "eager"):
        graph = capture(tiny_bert(attn=attn))
        assert not [f for f in find_frozen(infer(graph)) if "no rule" in f.why]


def test_bert_has_heads_and_neurons_in_every_layer():
    names = {g.name: g.size for g in groups_of(bert_graph())}
    assert names == {
        "encoder.layer.0.attention:heads": 4,
        "encoder.layer.0:neurons": 48,
        "encoder.layer.1.attention:heads": 4,
        "encoder.layer.1:neurons": 48,
    }


def test_head_width_is_seen_apart_from_heads():
    kinds = [g.kind for g in find_groups(infer(bert_graph()))]
    assert kinds.count("qk_width") == kinds.count("vo_width") == 2


def test_members_name_the_slices_of_the_state_dict():
    (group, *_) = groups_of(bert_graph(), "heads")
    members = {(m.parameter.removeprefix("encoder.layer.0.attention."), m.dim): m for m in group.members}
    assert set(members) == {
        ("self.query.weight", 0), ("self.query.bias", 0), ("self.key.weight", 0), ("self.key.bias", 0),
        ("self.value.weight", 0), ("self.value.bias", 0), ("output.dense.weight", 1),
    }  # fmt: skip
    assert all((m.start, m.view, m.axis) == (0, (4, 8), 0) for m in members.values())


def test_coinciding_sizes_do_not_confuse():
    """hidden = neurons = 16, 4 heads of 4, on batch 4 x 4 tokens: sizes are never used as names."""
    graph = capture(tiny_bert(heads=4, width=4, neurons=16))
    sizes = {g.name: (g.kind, g.size) for g in groups_of(graph)}
    assert sizes["encoder.layer.0.attention:heads"] == ("heads", 4)
    assert sizes["encoder.layer.0:neurons"] == ("neurons", 16)


class Transformed(nn.Module):
    """An op that has no rule between two linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.down(torch.fft.fft(self.up(x)).real)


def test_an_op_without_a_rule_freezes_what_it_touches_and_is_named():
    axes = infer(capture(randomise(Transformed()), torch.randn(4, 6)))
    assert not find_groups(axes)
    assert {f.name for f in find_frozen(axes) if "no rule for aten.fft_fft" in f.why} == {
        "up.weight[0]",
        "up.bias[0]",
        "down.weight[1]",
    }


class SharedTable(nn.Module):
    """One constant table scales the heads of two layers: it must not tie them to each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("table", torch.linspace(0.5, 2.0, 8))

    def forward(self, x):
        x = self.b(self.a(x) * self.table)
        return self.d(self.c(x) * self.table)


def test_constants_are_polymorphic():
    groups = [g for g in find_groups(infer(capture(randomise(SharedTable()), torch.randn(4, 6)))) if g.size == 8]
    assert len(groups) == 2


class Residual(nn.Module):
    """The stream's width is normalised over, so it is hidden, not neurons."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def test_the_residual_stream_is_one_hidden_group():
    groups = find_groups(infer(capture(randomise(Residual()), torch.randint(0, 20, (2, 5)))))
    kinds = sorted((g.kind, g.size) for g in groups)
    assert kinds == [("hidden", 16), ("layers", 1), ("neurons", 24), ("vocab", 20)]
    (hidden,) = [g for g in groups if g.kind == "hidden"]
    assert {m.parameter for m in hidden.members} == {
        "embed.weight", "norm.weight", "norm.bias", "up.weight", "down.weight", "down.bias", "head.weight",
    }  # fmt: skip
