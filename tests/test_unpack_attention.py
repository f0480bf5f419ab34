"""Packed attention in a user's own model: cut, counted, and run where there is only the dense op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checks import groups_of, random_plan, randomise, run_onnx
from test_prune import cut_and_masked
from tilecut import PruneConfig, attention_varlen, compile_pruned, load
from tilecut.make_cases import make_inputs
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.enforce_head_width import EnforceHeadWidth
from tilecut_passes.graph import value_of
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import LoweringError
from tilecut_targets.ascend.target import AscendTarget
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx

KINDS = ("heads", "kv_groups", "queries", "neurons", "qk_width", "vo_width")
DENSE, PACKED = torch.ops.tilecut.attention.default, torch.ops.tilecut.attention_varlen.default


class Layer(nn.Module):
    """8 query heads of 8 on `groups` KV heads, values of 4."""

    def __init__(self, groups: int, options: dict):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(32, 64),
            nn.Linear(32, 8 * groups),
            nn.Linear(32, 4 * groups),
            nn.Linear(32, 32),
        )
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.groups, self.options = groups, options

    def forward(self, x, y, cu_q, cu_k, slopes, longest):
        q, k, v = self.q(x).view(-1, 8, 8), self.k(y).view(-1, self.groups, 8), self.v(y).view(-1, self.groups, 4)
        bounds = (cu_q, cu_k, None, None, slopes)
        out, _ = attention_varlen(q, k, v, *bounds, max_q=longest, max_k=longest, **self.options)
        x = x + self.o(out.flatten(1))
        return x + self.down(torch.relu(self.up(x)))  # fmt: skip


class Layers(nn.Module):
    """Token embeddings and two layers."""

    def __init__(self, groups=4, longest=16, alibi=False, **options):
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        self.layers = nn.ModuleList(Layer(groups, options) for _ in range(2))
        self.longest = longest
        self.register_buffer("slopes", torch.arange(1.0, 9) / 9 if alibi else None)


class PackedModel(Layers):
    """Packed texts that read themselves."""

    def forward(self, ids, bounds):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, x, bounds, bounds, self.slopes, self.longest)
        return x


class Crosses(Layers):
    """Queries of one text, keys of another."""

    def forward(self, ids, others, bounds, other_bounds):
        x, y = self.embed(ids), self.embed(others)
        for layer in self.layers:
            x = layer(x, y, bounds, other_bounds, self.slopes, self.longest)
        return x


def cumulated(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def texts(lengths, others=None):
    """Inputs of texts of these lengths; of `others`, the texts whose keys are read."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = lambda n: torch.randint(0, 99, (sum(n),), generator=generator)
    if others is None:
        return {"ids": ids(lengths), "bounds": cumulated(lengths)}
    return {
        "ids": ids(lengths),
        "others": ids(others),
        "bounds": cumulated(lengths),
        "other_bounds": cumulated(others),
    }


def packed_graph(**options):
    sizes = {"ids": {0: "tokens"}, "bounds": {0: "sequences"}}
    return capture(randomise(PackedModel(**options)), texts([5, 0, 4]), sizes)


def crossed_graph(**options):
    sizes = {"ids": {0: "tokens"}, "others": {0: "keys"}, "bounds": {0: "n"}, "other_bounds": {0: "n"}}
    return capture(randomise(Crosses(**options)), texts([5, 2, 4], [3, 4, 6]), sizes)


RAGGED = ([5, 0, 4], [1], [1, 1, 1], [16], [3, 16, 1, 7], [0, 2, 0, 9, 0])
CROSSED = (([5, 2], [3, 4]), ([1, 1, 4], [6, 2, 1]), ([3, 0, 2], [0, 5, 4]), ([16], [1]))
OPTIONS = [
    {"causal": "top_left"},
    {"causal": "none", "window": (2, 1)},
    {"causal": "bottom_right", "window": (3, -1), "softcap": 2.0},
    {"causal": "none", "window": (1, 1), "global_tokens": 2, "alibi": True},
    {"causal": "top_left", "alibi": True, "groups": 8, "softcap": 3.0},
]


def test_groups_are_found_and_what_bounds_sequences_is_left_alone():
    graph = packed_graph(causal="top_left")
    found = [(g.kind, g.size) for g in groups_of(graph, *KINDS)]
    layer = [("kv_groups", 4), ("queries", 2), ("qk_width", 8), ("vo_width", 4), ("neurons", 128)]
    assert sorted(found) == sorted(2 * layer)
    assert [g.kind for g in groups_of(packed_graph(groups=8))].count("heads") == 2
    assert graph.row_sizes() == set()
    axes = infer(graph)
    node = next(n for n in graph.nodes if n.target is PACKED)
    out, lse = axes.of[node]
    assert out[0].root is lse[1].root and out[1].root is lse[0].root and out[0].leaves[0].frozen


@pytest.mark.parametrize(("longest", "met"), [(16, 16), (512, 128)])
def test_macs_are_those_of_the_longest_sequence_or_of_all_keys(longest, met):
    graph = packed_graph(longest=longest)
    axes = infer(graph)
    counter = MacCounter(axes, find_groups(axes), {"batch": 1, "sequence": 128})
    terms = [t for t in counter.terms if t.node.startswith("attention_varlen")]
    assert sum(counter.macs_of(t) for t in terms) == 2 * 128 * met * 8 * (8 + 4)
    halved = {g.name: 2 for g in groups_of(graph, "kv_groups")}
    assert sum(counter.macs_of(t, halved) for t in terms) == 128 * met * 8 * (8 + 4)


@settings(max_examples=8)
@given(groups=st.sampled_from([1, 2, 4, 8]), which=st.sampled_from(range(len(OPTIONS))), seed=st.integers(0, 10**6))
def test_masked_equals_cut(groups, which, seed):
    graph = packed_graph(**{**OPTIONS[which], "groups": groups})
    cut, masked = cut_and_masked(graph, random_plan(graph, seed, *KINDS))
    for lengths in RAGGED:
        assert largest_error(masked.run(texts(lengths)), cut.run(texts(lengths))) <= 1e-5, lengths


@pytest.mark.parametrize("how", ["pad", "cut"])
def test_head_widths_are_enforced(how):
    graph = packed_graph(causal="top_left")
    made = graph.copy()
    multiple = 16 if how == "pad" else 4
    assert run_passes(made, [EnforceHeadWidth(how=how, multiple=multiple)])[0].rewrites == (4 if how == "pad" else 0)
    node = next(n for n in made.nodes if n.target is PACKED)
    assert all(value_of(n).shape[2] % multiple == 0 for n in node.args[:3])
    for lengths in RAGGED:
        assert largest_error(graph.run(texts(lengths)), made.run(texts(lengths))) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("crossed", [False, True])
def test_the_dense_op_gives_the_same(options, crossed):
    graph = (crossed_graph if crossed else packed_graph)(**options)
    made = graph.copy()
    assert run_passes(made, [UnpackAttention()])[0].rewrites == 2
    assert UnpackAttention()(made) == 0
    first, second = [n for n in made.nodes if n.target is DENSE]
    assert first.args[4] is second.args[4]
    for given_texts in CROSSED if crossed else [(x,) for x in RAGGED]:
        inputs = texts(*given_texts)
        assert largest_error(graph.run(inputs), made.run(inputs)) < 1e-5, given_texts


@pytest.mark.parametrize(
    ("target", "options", "crossed"),
    [
        (EdgeTarget(), OPTIONS[1], False),
        (EdgeTarget(), OPTIONS[3], True),
        (AscendTarget(), OPTIONS[2], True),
        *(
            pytest.param(target, options, crossed, marks=pytest.mark.slow)
            for target in (EdgeTarget(), AscendTarget())
            for options in OPTIONS
            for crossed in (False, True)
        ),
    ],
)
def test_onnxruntime_gives_the_same(target, options, crossed, tmp_path):
    graph = (crossed_graph if crossed else packed_graph)(**options)
    made = graph.copy()
    run_passes(made, target.lowering)
    write_onnx(made, tmp_path / "model.onnx", 17, {DENSE: decomposed_attention})
    for given_texts in CROSSED if crossed else [(x,) for x in RAGGED]:
        inputs = texts(*given_texts)
        assert largest_error(graph.run(inputs), run_onnx(tmp_path / "model.onnx", inputs)) < 1e-4, given_texts


class Blocks(Layers):
    def forward(self, ids, bounds, offsets, indices):
        x = self.embed(ids).view(-1, 4, 8)
        return attention_varlen(x, x, x, bounds, bounds, offsets, indices, max_q=64, max_k=64)[0]


class Sums(Layers):
    def forward(self, ids, bounds):
        x = self.embed(ids).view(-1, 4, 8)
        return attention_varlen(x, x, x, bounds, bounds, max_q=64, max_k=64)[1]


def test_a_block_list_and_a_log_sum_exp_are_one_clear_error():
    lists = {"offsets": torch.tensor([[0, 1, 2]] * 4, dtype=torch.int32), "indices": torch.zeros(8, dtype=torch.int32)}
    graph = capture(Blocks().eval(), {**texts([5, 4]), **lists}, {"ids": {0: "tokens"}})
    with pytest.raises(
        LoweringError, match='has a block list, which the dense op does not take; compile for target="cuda"'
    ):
        run_passes(graph, [UnpackAttention()])
    assert groups_of(graph, *KINDS) == []
    graph = capture(Sums().eval(), texts([5, 4]), {"ids": {0: "tokens"}})
    with pytest.raises(LoweringError, match="node attention_varlen: its log-sum-exp is read"):
        run_passes(graph, [UnpackAttention()])


@pytest.mark.parametrize("crossed", [False, True])
def test_made_up_bounds_fit_the_tokens(crossed):
    graph = (crossed_graph if crossed else packed_graph)(longest=7)
    for batch, length in ((1, 1), (1, 30), (3, 8), (8, 4)):
        made = make_inputs(graph, batch, length, seed=batch)
        assert len(made["ids"]) == length and made["bounds"].tolist()[-1] == length
        assert len(made["bounds"]) == max(batch, -(-length // 7)) + 1
        assert made["bounds"].diff().min() >= 0 and made["bounds"].diff().max() <= 7
        graph.run(made)


@pytest.mark.parametrize("target", ["cuda", pytest.param("edge", marks=pytest.mark.slow)])
def test_a_packed_model_is_compiled_and_cut_by_half(target, tmp_path):
    model = randomise(PackedModel(causal="top_left", window=(3, -1)))
    sizes = {"ids": {0: "tokens"}, "bounds": {0: "sequences"}}
    calibration = [texts([5, 9, 16]), texts([7])]
    config = PruneConfig(sparsity=0.5, block=1)
    made = compile_pruned(
        model,
        target,
        texts([5, 4]),
        calibration,
        config,
        tmp_path / "a",
        dynamic_shapes=sizes,
        measure=target == "edge",
    )
    session, module = load(made.path, device="cpu"), made.module()
    assert sum(x.numel() for x in module.state_dict().values()) < sum(x.numel() for x in model.state_dict().values())
    for lengths in RAGGED:
        inputs = texts(lengths)
        (got,) = session.run({name: x.numpy() for name, x in inputs.items()}).values()
        with torch.no_grad():
            want = module(**inputs)
        assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)
