"""CANN's fused attention: graphs as text, the arguments for every mask, refusals, idempotence."""

import pytest
import torch
from torch import nn

from checks import encoder_graph, op_names, randomise
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import source, value_of
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.attention import attention
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.legality import ALL_TOKENS
from tilecut_targets.ascend.lower_attention import LowerAttention

OP = torch.ops.tilecut.attention.default


def nodes(graph, op=npu_ops.prompt_flash_attention):
    return [n for n in graph.nodes if n.target is op]


def test_before_and_after():
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention()])
    before = op_names(graph)
    assert before.split().count("attention") == 2
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 2
    # The mask is made once, before the first of them.
    after = before.replace(" attention ", " hidden_pairs prompt_flash_attention ", 1)
    assert op_names(graph) == after.replace(" attention ", " prompt_flash_attention ")
    assert not graph.refusals


def test_operands_and_options_are_the_attentions():
    fused = encoder_graph().copy()
    run_passes(fused, [FuseAttention()])
    lowered = fused.copy()
    run_passes(lowered, [LowerAttention()])
    (mask,) = nodes(lowered, npu_ops.hidden_pairs)
    for was, now in zip(nodes(fused, OP), nodes(lowered), strict=True):
        assert [n.name for n in now.args[:4]] == [*(n.name for n in was.args[:3]), mask.name]  # type: ignore[union-attr]
        assert now.args[4] is None
        heads = was.meta["val"].shape[1]
        assert now.kwargs == {
            "scale": 0.25, "sparse_mode": 0, "pre_tokens": ALL_TOKENS, "next_tokens": ALL_TOKENS, "kv_heads": heads,
            "inner_precise": 2, "expand": False,
        }  # fmt: skip
        assert now.meta["val"].shape == was.meta["val"].shape and now.meta["val"].dtype == torch.float32


def test_a_second_run_rewrites_nothing():
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention(), LowerAttention()])
    names = op_names(graph)
    assert LowerAttention()(graph) == 0
    assert op_names(graph) == names


class Attends(nn.Module):
    """Attention of x [B, 4, S, 16] with itself, in the spellings that it is given."""

    def __init__(self, *spellings):
        super().__init__()
        self.spellings = spellings
        self.slopes = nn.Parameter(torch.zeros(4))
        self.weight = nn.Parameter(torch.zeros(16, 24))

    def forward(self, x, keep):
        return {f"out_{i}": make(self, x, keep) for i, make in enumerate(self.spellings)}


def captured(*spellings, length=None):
    sizes = {"x": {0: "batch", 2: "sequence"}, "keep": {0: "batch", 1: "sequence"}} if length is None else {}
    example = {"x": torch.randn(2, 4, length or 5, 16), "keep": torch.ones(2, length or 5, dtype=torch.bool)}
    return capture(randomise(Attends(*spellings)), example, sizes)


def hide(keep):
    """A bias of 0 and minus infinity that no hypothesis about masks explains."""
    seen = (keep[:, None, :, None] == keep[:, None, None, :]) | (torch.arange(keep.shape[1]) % 3 == 0)
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, float("-inf"))


PLAIN = lambda m, x, keep: attention(x, x, x)
PADDED = lambda m, x, keep: attention(x, x, x, keep)
CAUSAL = lambda m, x, keep: attention(x, x, x, causal="bottom_right")
WINDOW = lambda m, x, keep: attention(x, x, x, causal="bottom_right", window=(3, -1))
HIDDEN = lambda m, x, keep: attention(x, x, x, None, hide(keep))
BIASED = lambda m, x, keep: attention(x, x, x, keep, x[:, :1] @ x[:, :1].transpose(-1, -2))
FREE = (ALL_TOKENS, ALL_TOKENS)


@pytest.mark.parametrize(
    ("spelling", "mode", "tokens", "shape"),
    [
        (PLAIN, 0, FREE, None),
        (PADDED, 0, FREE, "full"),
        (CAUSAL, 3, (ALL_TOKENS, 0), 2048),
        (lambda m, x, keep: attention(x, x, x, causal="top_left"), 3, (ALL_TOKENS, 0), 2048),
        (lambda m, x, keep: attention(x[:, :, :3], x, x, causal="bottom_right"), 3, (ALL_TOKENS, 0), 2048),
        (lambda m, x, keep: attention(x[:, :, :3], x, x, causal="top_left"), 2, (ALL_TOKENS, 0), 2048),
        # One query: no sparse mode; bottom right hides nothing.
        (lambda m, x, keep: attention(x[:, :, :1], x, x, causal="bottom_right"), 0, FREE, None),
        (lambda m, x, keep: attention(x[:, :, :1], x, x, causal="top_left"), 0, FREE, "full"),
        (WINDOW, 4, (3, 0), 2048),
        (lambda m, x, keep: attention(x, x, x, window=(3, 2)), 4, (3, 2), 2048),
        (lambda m, x, keep: attention(x[:, :, :3], x, x, window=(3, 2)), 0, FREE, "full"),
        (lambda m, x, keep: attention(x, x, x, keep, causal="bottom_right"), 0, (ALL_TOKENS, 0), "full"),
        (lambda m, x, keep: attention(x, x, x, keep, window=(3, 2)), 0, (3, 2), "full"),
        (lambda m, x, keep: attention(x, x, x, window=(3, 2), global_tokens=1), 0, FREE, "full"),
        (HIDDEN, 0, FREE, "full"),
    ],
)  # fmt: skip
def test_every_mask_has_its_sparse_mode(spelling, mode, tokens, shape):
    graph = captured(spelling)
    run_passes(graph, [LowerAttention()])
    (node,) = nodes(graph)
    given = node.kwargs
    assert (given["sparse_mode"], (given["pre_tokens"], given["next_tokens"])) == (mode, tokens)
    if shape is None:
        assert node.args[3] is None
    elif shape == "full":
        mask = value_of(source(node, 3))
        assert mask.shape[1] == 1 and mask.shape[2] == value_of(source(node)).shape[2]
        assert mask.dtype == torch.bool
    else:
        assert torch.equal(graph.tensor(str(source(node, 3).target)), torch.ones(shape, shape, dtype=torch.bool).triu(1))
    assert not graph.refusals


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("within", [lambda places, n: places < n, lambda places, n: n > places[None]])
def test_padding_that_is_made_of_lengths_is_told_by_them(within, causal):
    class Model(nn.Module):
        def forward(self, x, lengths):
            keep = within(torch.arange(x.shape[2]), lengths.unsqueeze(1))
            return attention(x, x, x, keep, causal=causal)

    example = {"x": torch.randn(2, 4, 7, 16), "lengths": torch.tensor([7, 3])}
    graph = capture(Model(), example, {"x": {0: "batch", 2: "sequence"}, "lengths": {0: "batch"}})
    run_passes(graph, [LowerAttention()])
    (node,) = nodes(graph)
    assert node.args[4] is graph.input_node("lengths") and node.kwargs["sparse_mode"] == (0 if causal == "none" else 2)
    assert (node.args[3] is None) == (causal == "none")


def test_places_that_do_not_count_keys_from_zero_are_a_mask():
    class Model(nn.Module):
        def forward(self, x, lengths):
            keep = torch.arange(1, x.shape[2] + 1) < lengths.unsqueeze(1)
            return attention(x, x, x, keep)

    example = {"x": torch.randn(2, 4, 7, 16), "lengths": torch.tensor([7, 3])}
    graph = capture(Model(), example, {"x": {0: "batch", 2: "sequence"}, "lengths": {0: "batch"}})
    run_passes(graph, [LowerAttention()])
    (node,) = nodes(graph)
    assert value_of(source(node, 3)).shape[1] == 1 and node.args[4] is None


def test_masks_are_made_once_each():
    graph = captured(CAUSAL, PADDED, WINDOW, PADDED, HIDDEN, CAUSAL, PLAIN)
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 7
    causal, padded, window, again, hidden, once_more, plain = (n.args[3] for n in nodes(graph))
    assert causal is window is once_more and padded is again and hidden is not padded and plain is None
    assert len(nodes(graph, npu_ops.hidden_pairs)) == 2
    # The additive form of the boolean mask is read by nobody.
    assert "masked_fill" not in op_names(graph)


@pytest.mark.parametrize("family", ["a3", "a950", "b310", "a910"])
def test_chips_without_the_op_leave_every_attention_alone(family):
    graph = captured(PLAIN, PADDED)
    before = op_names(graph)
    assert run_passes(graph, [LowerAttention(family)])[0].rewrites == 0
    assert op_names(graph) == before
    assert all("no fused attention in an .onnx file" in r.why for r in graph.refusals) and len(graph.refusals) == 2


GROUPED = lambda m, x, keep: attention(x, x[:, :2], x[:, :2], keep, causal="bottom_right")


def test_310p_takes_masks_at_fixed_multiples_of_128_and_repeats_kv_heads():
    graph = captured(GROUPED, length=256)
    assert run_passes(graph, [LowerAttention("p310")])[0].rewrites == 1
    (node,) = nodes(graph)
    given = node.kwargs
    assert (given["sparse_mode"], given["pre_tokens"], given["next_tokens"]) == (0, ALL_TOKENS, 0)
    assert (given["kv_heads"], given["expand"]) == (0, True)
    assert value_of(source(node, 3)).shape == (2, 1, 256, 256)


@pytest.mark.parametrize(
    ("spelling", "length", "why"),
    [
        (PADDED, None, "known at run time"),
        (PADDED, 130, "got 130 and 130; the nearest is 256"),
        (CAUSAL, None, "known at run time"),
        (lambda m, x, keep: attention(x[:, :, :128], x, x, keep), 256, "equally many"),
        (lambda m, x, keep: attention(x[:, :, :1], x, x), 128, "a decode step"),
    ],
)
def test_310p_refuses_the_rest_with_the_limit(spelling, length, why):
    graph = captured(spelling, length=length)
    assert run_passes(graph, [LowerAttention("p310")])[0].rewrites == 0
    (refusal,) = graph.refusals
    assert why in refusal.why


def test_310p_takes_any_length_without_a_mask():
    graph = captured(PLAIN)
    assert run_passes(graph, [LowerAttention("p310")])[0].rewrites == 1


WIDE = lambda n: lambda m, x, keep: (lambda y: attention(y, y, y))(torch.cat([x] * n, -1))
MANY = lambda heads, groups: lambda m, x, keep: attention(
    x[:, :1].expand(-1, heads, -1, -1), *(x[:, :1].expand(-1, groups, -1, -1),) * 2
)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (BIASED, "an additive bias"),
        (lambda m, x, keep: attention(x, x, x, None, hide(keep).expand(-1, 4, -1, -1)), "an additive bias"),
        (lambda m, x, keep: attention(x, x, x, None, None, m.slopes), "ALiBi"),
        (lambda m, x, keep: attention(x, x, x, softcap=2.0), "a soft-cap"),
        (lambda m, x, keep: attention(x, x, x, dropout_p=0.1), "dropout"),
        (lambda m, x, keep: attention(x, x, x @ m.weight), "queries are 16 wide and values 24; the nearest is 32"),
        (lambda m, x, keep: PLAIN(m, x[..., :8], keep), "up to 512; got 8; the nearest is 16"),
        (lambda m, x, keep: PLAIN(m, (x @ m.weight)[..., :20], keep), "got 20; the nearest is 32"),
        (WIDE(33), "got 528; the nearest is 512"),
        (MANY(100, 1), "got 100 heads on 1, 100; the nearest is 2 KV heads"),
        (MANY(257, 257), "got 257; the nearest is 256"),
    ],
)
def test_what_the_op_cannot_express_is_left_alone_with_the_reason(spelling, reason):
    graph = captured(spelling)
    before = op_names(graph)
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 0
    assert op_names(graph) == before
    (refusal,) = graph.refusals
    assert refusal.by == "LowerAttention" and reason in refusal.why
    assert [refusal.node] == [n.name for n in nodes(graph, OP)]


def test_the_widest_head_and_the_largest_ratio_are_lowered():
    for spelling in (WIDE(32), MANY(64, 1)):
        graph = captured(spelling)
        assert run_passes(graph, [LowerAttention()])[0].rewrites == 1
