"""onnxruntime's fused attentions: graphs as text, which form each spelling takes, refusals, and numbers in onnxruntime."""

import collections

import onnx
import pytest
import torch
from torch import nn

from checks import encoder_graph, op_names, randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.attention import attention
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.lower_attention import LowerAttention
from tilecut_targets.write_onnx import write_onnx

OP = torch.ops.tilecut.attention.default
HEADS, WIDTH = 3, 4


def apart(x, layer, heads=HEADS):
    """[B, S, I] -> [B, H, S, D]"""
    return layer(x).view(*x.shape[:2], heads, -1).transpose(1, 2)


def folded(x):
    """[B, H, S, E] -> [B, S, H*E]"""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class Spellings(nn.Module):
    """Many attentions side by side; `keep` [B, S] is True on the keys of x that count."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, HEADS * WIDTH) for _ in range(3))
        self.bare = nn.Linear(8, HEADS * WIDTH, bias=False)
        self.qkv = nn.Linear(8, 3 * HEADS * WIDTH)
        self.wide, self.one = nn.Linear(8, HEADS * 6), nn.Linear(8, WIDTH)
        self.slopes = nn.Parameter(torch.zeros(HEADS))

    def forward(self, keep, x, y):
        b, s, _ = x.shape
        q, k, v = apart(x, self.q), apart(x, self.k), apart(x, self.v)
        ks, vs, one = apart(y, self.k), apart(y, self.v), apart(x, self.one, 1)
        together = [z.transpose(1, 2) for z in self.qkv(x).view(b, s, 3, HEADS, WIDTH).unbind(2)]
        places = torch.arange(s, device=x.device)
        near = (places[:, None] - places).abs()
        bias = (self.slopes[:, None, None] * near)[None]
        hidden = torch.zeros_like(near, dtype=x.dtype).masked_fill(near == 1, -torch.inf)[None, None]
        raw = attention(q, k, v, keep, scale=0.4)
        return {
            "packed": folded(attention(q, k, v, keep)),
            "packed_causal": folded(attention(q, k, v, keep, causal="top_left")),
            "packed_bottom_right": folded(attention(q, k, v, causal="bottom_right")),
            "packed_without_a_bias": folded(attention(apart(x, self.bare), k, v, keep)),
            "packed_unfolded": raw * 2,
            "packed_by_rows": attention(q, k, v, keep, scale=0.6).transpose(1, 2).reshape(b * s, -1),
            "packed_both_ways": folded(raw) + raw.sum(1).repeat(1, 1, HEADS),
            "separate_from_one_layer": folded(attention(*together, keep)),
            "separate_causal": folded(attention(*together, keep, causal="bottom_right")),
            "separate_cross": folded(attention(q, ks, vs)),
            "separate_cross_padded": folded(attention(apart(y, self.q), k, v, keep)),
            "separate_wide_values": folded(attention(q, k, apart(x, self.wide), keep)),
            "separate_bias_padded": folded(attention(q, k, v, keep, bias, causal="top_left")),
            "separate_hidden": folded(attention(q, k, v, keep, hidden)),
            "separate_groups": folded(attention(q, one, one, keep)),
            "separate_window": folded(attention(q, k, v, keep, window=(3, -1), causal="top_left")),
            "separate_band": folded(attention(q, k, v, keep, bias, window=(3, 4))),
            "separate_global": folded(attention(q, k, v, keep, window=(2, 2), global_tokens=1)),
            "separate_cross_window": folded(attention(q, ks, vs, window=(3, 20), global_tokens=3)),
        }


class Refused(nn.Module):
    """Attentions that the fused ops cannot express."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, HEADS * WIDTH)
        self.slopes = nn.Parameter(torch.zeros(HEADS))

    def forward(self, keep, x, y):
        q, other = apart(x, self.q), apart(y, self.q)
        row = x.sum(-1)[:, None, None, :]
        return {
            "softcap": attention(q, q, q, keep, softcap=2.0),
            "alibi": attention(q, q, q, keep, None, self.slopes),
            "top_left": attention(q, other, other, causal="top_left"),
            "bottom_right": attention(q, other, other, causal="bottom_right"),
            "row_bias": attention(q, q, q, keep, row),
            "dropout": attention(q, q, q, keep, dropout_p=0.1),
        }


REASONS = {
    **dict.fromkeys(("softcap", "alibi"), "soft-cap or ALiBi: the fused ops of the CPU provider have none"),
    "top_left": "top_left causal attention between different numbers of queries and keys",
    "bottom_right": "bottom_right causal attention between different numbers of queries and keys",
    "row_bias": "a bias that is broadcast over queries or keys",
    "dropout": "dropout: the fused ops of the CPU provider have none",
}


def inputs(b=2, s=7, t=5):
    # No two neighbours are hidden, so that every query sees a key even through a window.
    places = torch.arange(s)
    keep = ((places + torch.arange(b)[:, None]) % 3 != 1) | (places == 0)
    return {"keep": keep, "x": torch.randn(b, s, 8), "y": torch.randn(b, t, 8)}


def captured(module):
    sequence = {0: "batch", 1: "sequence"}
    return capture(randomise(module), inputs(), {"keep": sequence, "x": sequence, "y": {0: "batch", 1: "memory"}})


@pytest.fixture(scope="module")
def graph():
    return captured(Spellings())


@pytest.fixture(scope="module")
def lowered(graph):
    made = graph.copy()
    run_passes(made, [LowerAttention()])
    return made


@pytest.fixture(scope="module")
def path(lowered, tmp_path_factory):
    made = tmp_path_factory.mktemp("edge") / "model.onnx"
    write_onnx(lowered, made, ort_ops.ONNX_OPSET, {OP: decomposed_attention})
    return made


def nodes(graph, op):
    return [n for n in graph.nodes if n.target is op]


def behind(graph, name):
    """The attention nodes that an output depends on."""
    found, seen, todo = [], set(), [graph.results[graph.outputs.index(name)]]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in (OP, ort_ops.attention, ort_ops.multi_head_attention):
            found.append(node)
        else:
            todo += node.all_input_nodes
    return found


FORMS = {"packed": ort_ops.attention, "separate": ort_ops.multi_head_attention}


def test_every_spelling_takes_the_form_that_fits(lowered):
    for name in lowered.outputs:
        (node,) = behind(lowered, name)
        assert node.target is FORMS[name.partition("_")[0]], name


def test_what_the_ops_cannot_express_is_left_alone_with_the_reason():
    graph = captured(Refused())
    before = op_names(graph)
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 0
    assert op_names(graph) == before
    assert {r.by for r in graph.refusals} == {"LowerAttention"}
    said = {r.node: r.why for r in graph.refusals}
    assert {name: said[behind(graph, name)[0].name] for name in graph.outputs} == REASONS


def test_a_second_run_rewrites_nothing(lowered):
    again = lowered.copy()
    assert LowerAttention()(again) == 0
    assert op_names(again) == op_names(lowered)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 7, 5), (3, 5, 11), (8, 33, 2)])
def test_every_spelling_has_the_ops_numbers_in_onnxruntime(graph, path, sizes):
    given = inputs(*sizes)
    want, got = graph.run(given), run_onnx(path, given)
    for name in graph.outputs:
        assert largest_error({name: want[name]}, got) < 1e-5, name


def test_the_file_holds_one_node_an_attention_and_one_cast_of_the_mask(graph, path):
    counts = collections.Counter(n.op_type for n in onnx.load(str(path)).graph.node)
    names = [name.partition("_")[0] for name in graph.outputs]
    # raw is one attention behind two outputs.
    assert counts["Attention"] == names.count("packed") - 1
    assert counts["MultiHeadAttention"] == names.count("separate")
    assert counts["Softmax"] == 0
    masks = {n.input[3] for n in onnx.load(str(path)).graph.node if n.op_type == "Attention" and len(n.input) > 3}
    assert len(masks) == 1


def test_attributes_are_the_ops(path):
    model = onnx.load(str(path))
    fused = [n for n in model.graph.node if n.domain == "com.microsoft"]
    assert {n.op_type for n in fused} == {"Attention", "MultiHeadAttention"}
    held = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in fused]
    assert {a["num_heads"] for a in held} == {HEADS}
    assert sorted({round(a["scale"], 4) for a in held}) == [0.4, 0.5, 0.6]
    assert sum(a["unidirectional"] for a in held) == 5
    assert all("qkv_hidden_sizes" not in a for a in held)
    assert ("com.microsoft", 1) in {(o.domain, o.version) for o in model.opset_import}


def test_a_bert_like_graph_before_and_after():
    before = encoder_graph().copy()
    run_passes(before, [FuseAttention()])
    after = before.copy()
    assert run_passes(after, [LowerAttention()])[0].rewrites == 2
    rest = "add layer_norm linear gelu linear add layer_norm"
    one = f"linear reshape transpose linear reshape transpose linear reshape transpose attention transpose reshape linear {rest}"
    head = "ne sym_size sym_size embedding arange embedding add"
    assert op_names(before) == f"{head} {one} {one} select"
    head = "ne sym_size embedding arange embedding add"
    assert op_names(after) == f"{head} _to_copy attention linear {rest} attention linear {rest} select"
    assert not after.refusals


def test_weights_are_packed_query_key_value_and_the_separate_ones_are_gone():
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention(), LowerAttention()])
    first, second = nodes(graph, ort_ops.attention)
    for i, node in enumerate((first, second)):
        dense = encoder_graph()
        weight, bias = (graph.tensor(str(n.target)) for n in node.args[1:3])  # type: ignore[union-attr]
        assert torch.equal(weight, torch.cat([dense.tensor(f"{p}.{i}.weight") for p in "qkv"]).T)
        assert torch.equal(bias, torch.cat([dense.tensor(f"{p}.{i}.bias") for p in "qkv"]))
    assert first.args[4:] == (2, 0.25, False) and second.args[4:] == (3, 0.25, False)
    assert not [name for name in graph.tensors if name.startswith(("q.", "k.", "v."))]


class Windowed(nn.Module):
    """Two layers of attention under a mask that is kept as a tensor; a padded query may see no key at all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x, attention_mask):
        places = torch.arange(x.shape[1], device=x.device)
        mask = ((places[:, None] - places).abs() <= 2)[None, None] & (attention_mask != 0)[:, None, None, :]
        for layer in self.layers:
            q = apart(x, layer, 2)
            x = x + folded(nn.functional.scaled_dot_product_attention(q, q, q, mask))
        return x


def test_a_query_without_a_key_spoils_no_other(tmp_path):
    example = {"x": torch.randn(2, 9, 8), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    graph = capture(randomise(Windowed()), example)
    made = graph.copy()
    run_passes(made, [FuseAttention(), LowerAttention()])
    assert len(nodes(made, ort_ops.multi_head_attention)) == 2
    write_onnx(made, tmp_path / "m.onnx", ort_ops.ONNX_OPSET)
    given = {"x": torch.randn(2, 20, 8), "attention_mask": (torch.arange(20) < torch.tensor([[20], [6]])).long()}
    want, got = graph.run(given), run_onnx(tmp_path / "m.onnx", given)
    rows = given["attention_mask"] != 0
    assert got["output"].isfinite().all()
    assert largest_error({"output": want["output"][rows]}, {"output": got["output"][rows]}) < 1e-5
