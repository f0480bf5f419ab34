"""Token pruning: removed equals hidden, padding first, and every refusal one clear error."""

from __future__ import annotations

import functools

import pytest
import torch

from checks import compiled, emit, encoder_graph, op_names, randomise, run_onnx, text_batch, tiny_bert
from tilecut import PruneConfig, compile_pruned, load
from tilecut.make_cases import make_inputs
from tilecut.plan_tokens import TokenSchedule, fused_stream, plan_tokens
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.count_token_macs import TokenMacCounter
from tilecut_passes.find_token_sites import TokenStream, find_token_sites
from tilecut_passes.graph import Graph
from tilecut_passes.mask_tokens import MaskTokens
from tilecut_passes.prune_tokens import PruneTokens, token_passes
from tilecut_passes.run_passes import Pass, largest_error, run_passes
from tilecut_passes.token_plan import MEAN, OWN, TokenPlan
from tilecut_runtime.errors import ConfigError, InputError, PlanError
from tilecut_targets.find_target import find_target
from zoo import ZOO

# Encoders of every spelling: fused, written out, over static places, with the positions first, shared layers, and the
# encoder of an encoder-decoder.
ENCODERS = ("bert", "bert_eager", "roberta", "distilbert", "electra", "albert", "vit", "deit", "nn_encoder", "bart")
SHAPES = ((2, 9), (3, 37))


@functools.cache
def fused(name: str) -> tuple[Graph, TokenStream]:
    """A model of the zoo, every number re-randomised, with its attentions fused, and its stream."""
    torch.manual_seed(0)
    built = ZOO[name].build()
    model, example = built if isinstance(built, tuple) else (built, None)
    return fused_stream(capture(randomise(model), example))


@functools.cache
def deep_bert() -> tuple[Graph, TokenStream]:
    """A BERT of four layers."""
    return fused_stream(capture(tiny_bert(layers=4)))


def schedule(stream: TokenStream, *fractions: float, restored: str = MEAN) -> tuple[TokenPlan, ...]:
    """Fractions behind the first layers."""
    return tuple(TokenPlan(site.name, f, restored=restored) for site, f in zip(stream.sites, fractions))


def after(graph: Graph, one: Pass) -> Graph:
    """A copy that a pass has rewritten."""
    made = graph.copy()
    assert run_passes(made, [one])[0].rewrites
    return made


@pytest.mark.parametrize("restored", [MEAN, OWN])
@pytest.mark.parametrize("name", ENCODERS)
def test_removed_equals_hidden(name, restored):
    graph, stream = fused(name)
    tokens = schedule(stream, 0.4, restored=restored)
    cut, masked = after(graph, PruneTokens(tokens)), after(graph, MaskTokens(tokens))
    for i, shape in enumerate(SHAPES):
        inputs = make_inputs(graph, *shape, seed=i)
        got = cut.run(inputs)
        assert largest_error(masked.run(inputs), got) <= 1e-5
        assert largest_error(graph.run(inputs), got) > 1e-5, "nothing was removed"


@pytest.mark.parametrize("restored", [MEAN, OWN])
@pytest.mark.parametrize("fractions", [(0.6, 0.4, 0.2), (1.0, 0.5, 0.5), (0.01, 0.01, 0.01)])
def test_a_schedule_over_several_layers(fractions, restored):
    graph, stream = deep_bert()
    tokens = schedule(stream, *fractions, restored=restored)
    cut, masked = after(graph, PruneTokens(tokens)), after(graph, MaskTokens(tokens))
    for i, shape in enumerate((*SHAPES, (1, 1), (4, 64))):
        inputs = make_inputs(graph, *shape, seed=i)
        assert largest_error(masked.run(inputs), cut.run(inputs)) <= 1e-5


def test_all_but_the_layers_that_are_looked_into_stay_fused():
    graph, stream = deep_bert()
    names = op_names(after(graph, PruneTokens(schedule(stream, 0.5)))).split()
    assert names.count("attention") == 3 and names.count("softmax") == 1
    assert (names.count("gather"), names.count("scatter")) == (2, 1)


def test_keeping_every_token_changes_nothing():
    graph, stream = deep_bert()
    assert PruneTokens(schedule(stream, 1.0, 1.0))(graph.copy()) == 0
    assert token_passes(schedule(stream, 1.0)) == ()


def test_padding_goes_first():
    """Rows with no more real tokens than stay lose none: their outputs are the dense model's."""
    graph, stream = deep_bert()
    cut = after(graph, PruneTokens(schedule(stream, 0.5)))
    inputs = text_batch(4, 20, seed=3)
    lengths = torch.tensor([20, 10, 4, 1])
    inputs["attention_mask"] = (torch.arange(20)[None] < lengths[:, None]).long()
    want, got = graph.run(inputs)["last_hidden_state"], cut.run(inputs)["last_hidden_state"]
    for row, length in enumerate(lengths.tolist()):
        same = torch.allclose(want[row, :length], got[row, :length], atol=1e-5)
        assert same == (length <= 10)


def test_padding_on_the_left_goes_first_too():
    graph, stream = deep_bert()
    cut = after(graph, PruneTokens(tuple(TokenPlan(one.after, one.keep, first=0) for one in schedule(stream, 0.5))))
    inputs = text_batch(2, 20, seed=3)
    inputs["attention_mask"] = (torch.arange(20)[None] >= torch.tensor([[12], [10]])).long()
    want, got = graph.run(inputs)["last_hidden_state"], cut.run(inputs)["last_hidden_state"]
    assert torch.allclose(want[inputs["attention_mask"] == 1], got[inputs["attention_mask"] == 1], atol=1e-5)


def test_what_padding_holds_does_not_matter():
    graph, stream = deep_bert()
    cut = after(graph, PruneTokens(schedule(stream, 0.5, 0.3)))
    inputs = text_batch(3, 20, seed=1)
    real = inputs["attention_mask"] == 1
    other = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], 7)}
    a, b = (cut.run(x)["last_hidden_state"][real] for x in (inputs, other))
    assert torch.allclose(a, b, atol=1e-5)


def test_the_tokens_that_stay_are_those_looked_at_most():
    """Against importance computed by hand from the layer's own probabilities."""
    graph, stream = deep_bert()
    model = tiny_bert(layers=4, attn="eager")
    inputs = text_batch(2, 15, seed=2)
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    importance = (out.attentions[0] * real[:, None, :, None]).sum((1, 2)).masked_fill(~real, -1)
    importance[:, 0] = float("inf")
    best = importance.topk(8, 1).indices
    got = after(graph, PruneTokens(schedule(stream, 0.5, restored=OWN))).run(inputs)["last_hidden_state"]
    left = out.hidden_states[1]
    for row in range(2):
        moved = ~torch.isclose(left[row], got[row], atol=1e-5).all(-1)
        assert set(moved.nonzero()[:, 0].tolist()) == set(best[row].tolist())


def test_mean_pooling_is_that_of_the_tokens_that_stayed():
    graph, stream = deep_bert()
    inputs = text_batch(3, 20, seed=4)
    real = inputs["attention_mask"].float()[..., None]
    mean, own = (
        after(graph, PruneTokens(schedule(stream, 0.5, 0.3, restored=how))).run(inputs)["last_hidden_state"]
        for how in (MEAN, OWN)
    )
    stayed = torch.isclose(mean, own, atol=1e-5).all(-1)[..., None] * real
    pooled = [(x * w).sum(1) / w.sum(1) for x, w in ((mean, real), (own, stayed))]
    assert torch.allclose(*pooled, atol=1e-4)


def test_onnx_gives_the_same_on_ragged_inputs(tmp_path):
    graph, stream = deep_bert()
    cut = after(graph, PruneTokens(schedule(stream, 0.5, 0.3)))
    made = emit(find_target("edge"), cut, tmp_path / "out")
    assert all(r.status == "passed" for r in find_target("edge").verify(made.folder, made.manifest, made.cases))
    for i, shape in enumerate((*SHAPES, (1, 1), (5, 40))):
        inputs = make_inputs(graph, *shape, seed=i)
        got, want = run_onnx(tmp_path / "out" / "model.onnx", inputs), cut.run(inputs)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        assert largest_error(want, got) <= 1e-5


@pytest.mark.parametrize("name", ["vit", "nn_encoder", "distilbert"])
def test_onnx_of_other_encoders(name, tmp_path):
    graph, stream = fused(name)
    cut = after(graph, PruneTokens(schedule(stream, 0.4)))
    made = emit(find_target("edge"), cut, tmp_path / "out")
    assert all(r.status == "passed" for r in find_target("edge").verify(made.folder, made.manifest, made.cases))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "is causal"),
        ("mpnet", "has a bias for pairs of positions"),
        ("modernbert", "sees a window of positions"),
        ("swin", "has a bias for pairs of positions"),
        ("nn_mha", "1 self-attention layers"),
        ("linear_attention", "0 self-attention layers"),
    ],
)
def test_models_without_a_place_say_why(name, why):
    with pytest.raises(ConfigError, match=f"no token can be removed from this model.*{why}"):
        fused(name)


class Shifting(torch.nn.Module):
    """An encoder whose layers move every token to the next place."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.roll(layer(x), 1, 1)
        return x


def test_an_op_that_mixes_tokens_is_named():
    with pytest.raises(ConfigError, match=r"roll.* may mix tokens"):
        fused_stream(capture(randomise(Shifting()), torch.randn(2, 7, 16)))


def test_unfused_attention_is_refused():
    assert "is not fused" in str(find_token_sites(encoder_graph()))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([TokenPlan("encoder.layer.0", 0.0)], "no such part of the tokens can stay; got 0.0"),
        ([TokenPlan("encoder.layer.0", 1.5)], "no such part of the tokens can stay; got 1.5"),
        ([TokenPlan("encoder.layer.0", 0.5), TokenPlan("encoder.layer.1", 0.6)], "more tokens stay than are left; got 0.6"),
        ([TokenPlan("encoder.layer.0", 0.5), TokenPlan("encoder.layer.0", 0.5)], "is there twice"),
        ([TokenPlan("encoder.layer.0", 0.5, first=-1)], "first tokens stay"),
        ([TokenPlan("encoder.layer.0", 0.5, restored="zero")], "cannot be restored so; got 'zero'; wanted 'mean' or 'own'"),
        ([TokenPlan("encoder.layer.3", 0.5)], "no such layer has others behind it; got encoder.layer.3; wanted one of"),
    ],
)
def test_impossible_plans_are_one_error(tokens, message):
    graph, _ = deep_bert()
    with pytest.raises(PlanError) as caught:
        PruneTokens(tuple(tokens))(graph.copy())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wishes_name_layers_by_number_name_and_pattern():
    _, stream = deep_bert()
    want = (TokenPlan("encoder.layer.0", 0.9), TokenPlan("encoder.layer.1", 0.5), TokenPlan("encoder.layer.2", 0.5))
    assert plan_tokens(stream, {"*layer.[12]": 0.5, 0: 0.9}) == want
    assert plan_tokens(stream, {"0": 0.9, "encoder.layer.1": 0.5, 2: 0.5}) == want
    for wishes, message in (({7: 0.5}, "no such layer"), ({"*layer*": 0.5, 1: 0.5}, "two wishes are for")):
        with pytest.raises(ConfigError, match=message):
            plan_tokens(stream, wishes)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_macs_are_those_of_the_graph_that_is_cut(name):
    graph, stream = fused(name)
    torch.manual_seed(0)
    dense = capture(randomise(ZOO[name].build()))
    tokens, at = schedule(stream, 0.4), {"batch": 2, "sequence": 25}
    axes = infer(dense)
    counted = TokenMacCounter(axes, find_groups(axes), at, stream, tokens).total()
    cut = after(graph, PruneTokens(tokens))
    assert counted == MacCounter(infer(cut), [], at).total()
    assert counted < MacCounter(axes, [], at).total()


def test_compiles_to_a_verified_artifact(tmp_path):
    model = tiny_bert(layers=3, width=16, neurons=128)
    at = {"sequence": 16}
    artifact = compiled("edge", tmp_path / "a", model=model, config=PruneConfig(sparsity=0.5, at=at, tokens={0: 0.5}))
    assert artifact.plan.tokens == (TokenPlan("encoder.layer.0", 0.5),)
    rungs = {r.name: r.status for r in artifact.manifest.verification}
    assert rungs["tokens: cut equals masked"] == rungs["artifact equals pruned model"] == "passed"
    macs = artifact.report["macs"]
    assert macs["prunable_pruned"] <= 0.5 * macs["prunable_dense"]
    (row,) = artifact.report["tokens"]
    assert (row["after"], row["of"], row["kept"]) == ("encoder.layer.0", 16, 8) and row["macs_with_all"] > macs["pruned"]
    inputs = text_batch(3, 11)
    want = run_onnx(tmp_path / "a" / "model.onnx", inputs)["last_hidden_state"]
    got = artifact.module()(**inputs)["last_hidden_state"]
    assert torch.allclose(want, got, atol=1e-4)
    # Half of the tokens leave more units in the same budget.
    whole = compiled("edge", tmp_path / "b", model=model, config=PruneConfig(sparsity=0.5, at=at))
    kept = lambda plan: sum(len(g.kept) for g in plan.groups)
    assert kept(artifact.plan) > kept(whole.plan) and whole.report["tokens"] == []


def test_the_exported_program_takes_what_leaves_two_tokens(tmp_path):
    """torch.export takes a size of 1 for a constant: the cuda artifact says which lengths it has."""
    model = tiny_bert(layers=3, width=16, neurons=128)
    artifact = compiled("cuda:sm_90", tmp_path / "a", model=model, config=PruneConfig(sparsity=0.3, tokens={0: 0.5}))
    assert artifact.manifest.dims["sequence"].min == 3
    session = load(tmp_path / "a", device="cpu")
    inputs = {name: x[:, :3].numpy() for name, x in text_batch(2, 8, seed=1).items()}
    assert session.run(inputs)["last_hidden_state"].shape[:2] == (2, 3)
    with pytest.raises(InputError, match="sequence"):
        session.run({name: x[:, :2] for name, x in inputs.items()})


def test_search_finds_a_schedule_within_the_budget(tmp_path):
    model = tiny_bert(layers=3, width=16, neurons=64)
    # Groups that may not shrink leave only tokens to go.
    config = PruneConfig(sparsity=0.3, at={"sequence": 16}, tokens="search", keep=("*",))
    artifact = compiled("edge", tmp_path / "a", model=model, config=config)
    assert artifact.plan.tokens
    macs = artifact.report["macs"]
    assert macs["prunable_pruned"] <= 0.7 * macs["prunable_dense"]
    assert all(len(g.kept) == g.size for g in artifact.plan.groups)


def test_search_and_latency_need_what_they_need(tmp_path):
    model = tiny_bert()
    with pytest.raises(ConfigError, match="'search' weighs tokens against units by measured losses and MACs"):
        compiled("edge", tmp_path / "a", model=model, config=PruneConfig(tokens="search", method="magnitude"))
    with pytest.raises(ConfigError, match="no token can be removed"):
        compile_pruned(ZOO["gpt2"].build(), "edge", config=PruneConfig(tokens={0: 0.5}), output=tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_schedule_counts_for_its_own_stream():
    _, stream = deep_bert()
    dense = capture(tiny_bert(layers=4))
    axes = infer(dense)
    at = {"batch": 1, "sequence": 20}
    totals = [
        TokenSchedule(stream, schedule(stream, f)).counter(axes, find_groups(axes), at).total() for f in (0.25, 0.5, 0.75)
    ]
    assert totals == sorted(totals) and totals[-1] < MacCounter(axes, [], at).total()
