"""Wanda, fluctuation and REAP against formulas written out in float64 over what hooks see of the module itself."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from checks import mlp_graph, randomise, text_batch, tiny_bert
from score_models import ConvNet, SigmoidExperts, batches_of, scored, tiny_llama
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.read_contractions import read_contractions
from tilecut_passes.score import Ranking, score
from tilecut_passes.score_weights import member_slices
from tilecut_runtime.errors import CalibrationError
from zoo import GQA


def inputs_of(module, layer, batches):
    """The real positions of what a layer reads, as rows, over all batches; float64."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    rows = []
    with torch.no_grad():
        for batch in batches:
            module(**batch.inputs)
            real = batch.mask != 0 if batch.mask is not None else torch.ones(seen[-1].shape[:-1], dtype=torch.bool)
            rows.append(seen[-1][real])
    hook.remove()
    return torch.cat(rows)


def by_hand(method, x, w, units):
    """Scores of `units` (lists of columns) from inputs [n, K] and a weight [O, K]."""
    if method == "wanda":
        each = x.square().sum(0).sqrt() * w.abs().sum(0)
        return torch.stack([each[u].sum() for u in units])
    if method == "flap":
        each = x.var(0, unbiased=False) * w.square().sum(0)
        return torch.stack([each[u].sum() for u in units])
    norms = torch.stack([(x[:, u] @ w[:, u].T).norm(dim=1) for u in units], 1)
    return norms.sum(0) / (norms != 0).sum(0).clamp_min(1)


def priced(method, scores):
    """The ranking of one group that is scored alone: it has all the parameters."""
    if method == "flap":
        scores = (scores - scores.mean()) / scores.std()
        return Ranking.of_scores((scores - scores.min()) / len(scores))
    return Ranking.of_scores(scores / scores.sum())


def agrees(method, graph, group, batches, scores):
    """Whether the score of one group alone is what was worked out by hand."""
    got, want = score(method, graph, [group], batches)[group.name], priced(method, scores)
    assert got.losses == pytest.approx(want.losses, rel=2e-4, abs=1e-9)
    assert [float(scores[u]) for u in got.order] == pytest.approx([float(scores[u]) for u in want.order], rel=1e-4)


METHODS = ("wanda", "flap", "reap")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("neurons", [5, 20])
def test_neurons_of_an_mlp(method, neurons):
    graph = mlp_graph(neurons=neurons)
    (group,) = find_groups(infer(graph))
    batches = batches_of("mlp", graph, rows=7)
    x = torch.cat([b.inputs["x"] for b in batches])
    hidden = torch.relu(x @ graph.tensor("up.weight").T + graph.tensor("up.bias")).detach().double()
    w = graph.tensor("down.weight").detach().double()
    agrees(method, graph, group, batches, by_hand(method, hidden, w, [[u] for u in range(neurons)]))


@pytest.mark.parametrize("method", METHODS)
def test_heads_and_neurons_of_a_padded_bert(method):
    graph, groups = scored("bert")
    model: Any = tiny_bert()
    batches = batches_of("bert", graph, labels=False)
    layer = model.encoder.layer[1]
    for group in groups[2:]:
        dense = layer.attention.output.dense if group.kind == "heads" else layer.output.dense
        width = dense.in_features // group.size
        units = [list(range(u * width, (u + 1) * width)) for u in range(group.size)]
        x = inputs_of(model, dense, batches)
        agrees(method, graph, group, batches, by_hand(method, x, dense.weight.detach().double(), units))


@pytest.mark.parametrize("method", METHODS)
def test_kv_groups_and_queries_of_a_padded_llama(method):
    """Heads 2g and 2g + 1 read KV group g; query index r is head r of every KV group."""
    graph, groups = scored("llama")
    model, batches = tiny_llama(), batches_of("llama", graph, labels=False)
    dense = model.model.layers[0].self_attn.o_proj
    x, w = inputs_of(model, dense, batches), dense.weight.detach().double()
    columns = torch.arange(64).reshape(4, 2, 8)
    by_kind = {
        "kv_groups": [columns[g].flatten().tolist() for g in range(4)],
        "queries": [columns[:, r].flatten().tolist() for r in range(2)],
    }
    for group in groups[:2]:
        agrees(method, graph, group, batches, by_hand(method, x, w, by_kind[group.kind]))


@pytest.mark.parametrize("method", METHODS)
def test_channels_of_a_convolution(method):
    """Every place of the input counts; what a place adds lies in all outputs and the whole window."""
    graph, groups = scored("conv")
    model, batches = randomise(ConvNet()), batches_of("conv", graph)
    image = torch.cat([b.inputs["image"] for b in batches])
    x = torch.relu(model.first(image)).detach().double().permute(0, 2, 3, 1).reshape(-1, 10)
    w = model.second.weight.detach().double().permute(0, 2, 3, 1).reshape(-1, 10)
    agrees(method, graph, groups[0], batches, by_hand(method, x, w, [[u] for u in range(10)]))


class GroupedConv(nn.Module):
    """Twelve channels that a convolution contracts in three groups."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv1d(4, 12, 1), nn.Conv1d(12, 6, 3, groups=3), nn.Conv1d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("method", METHODS)
def test_channels_of_a_convolution_in_groups(method):
    """Units are the three groups, or the four channels of each: outputs of another group see nothing of a channel.

    The groups are read once more, as pairs of outputs, by the head.
    """
    model = randomise(GroupedConv())
    graph = capture(model, torch.randn(2, 4, 9))
    batches = [Batch({"x": torch.randn(2, 4, 9)}) for _ in range(2)]
    x = torch.relu(model.first(torch.cat([b.inputs["x"] for b in batches]))).detach()
    w = torch.zeros(6, 3, 12, dtype=torch.float64)
    for channel in range(12):
        own = slice(channel // 4 * 2, channel // 4 * 2 + 2)
        w[own, :, channel] = model.second.weight.detach().double()[own, channel % 4]
    y = model.second(x).detach().double().transpose(1, 2).reshape(-1, 6)
    x, w = x.double().transpose(1, 2).reshape(-1, 12), w.reshape(18, 12)
    groups = {g.size: g for g in find_groups(infer(graph))}
    within = by_hand(method, x, w, [[j, j + 4, j + 8] for j in range(4)])
    agrees(method, graph, groups[4], batches, within)
    read = by_hand(method, y, model.head.weight.detach().double()[..., 0], [[2 * j, 2 * j + 1] for j in range(3)])
    across = by_hand(method, x, w, [list(range(4 * j, 4 * j + 4)) for j in range(3)])
    agrees(method, graph, groups[3], batches, across + read)


@pytest.mark.parametrize("spelling", ["einsum", "bmm", "three"])
def test_reap_of_experts_is_the_norm_of_gate_times_output(spelling):
    graph, groups = scored(spelling)
    model, batches = randomise(SigmoidExperts(spelling)), batches_of(spelling, graph)
    sums = torch.zeros(5, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for batch in batches:
            x = model.inner(batch.inputs["x"][batch.mask != 0])
            gates = torch.sigmoid(model.router(x))
            for e in range(5):
                each = gates[:, e : e + 1] * (F.gelu(x @ model.up[e]) @ model.down[e])
                sums[e] += each.double().norm(dim=1).sum()
            count += len(x)
    (experts,) = [g for g in groups if g.size == 5]
    agrees("reap", graph, experts, batches, sums / count)


@pytest.mark.parametrize("method", ["wanda", "flap"])
def test_the_two_spellings_of_a_weighted_sum_of_experts_agree(method):
    found = []
    for spelling in ("einsum", "bmm"):
        graph, groups = scored(spelling)
        (experts,) = [g for g in groups if g.size == 5]
        found.append(score(method, graph, [experts], batches_of(spelling, graph))[experts.name])
    assert found[0].order == found[1].order
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)


@functools.lru_cache(maxsize=2)
def routed(chosen):
    """A tiny Mixtral whose tokens choose so many experts."""
    config = transformers.MixtralConfig(
        **{**GQA, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=chosen
    )
    model = randomise(transformers.MixtralForCausalLM(config))
    return model, capture(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chosen", [1, 2])
def test_neurons_of_routed_experts_see_the_tokens_routed_to_them(method, chosen):
    """Mixtral: rows of an expert are the real tokens that chose it, and its own matrix multiplies them."""
    model, graph = routed(chosen)
    group = next(g for g in find_groups(infer(graph)) if g.name.endswith("mlp.experts:neurons"))
    made = [{k: v for k, v in text_batch(4, 9, seed=i).items() if k != "token_type_ids"} for i in range(3)]
    batches = check_batches(graph, made)
    experts = model.model.layers[0].mlp.experts
    seen = []
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    parts = {e: [] for e in range(4)}
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs)
            hidden, index = seen[-1][0].reshape(-1, 32), seen[-1][1].reshape(-1, chosen)
            real = (batch.mask != 0).flatten()
            for e in range(4):
                rows = hidden[real & (index == e).any(1)]
                gate, up = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
                parts[e].append((F.silu(gate) * up).double())
    hook.remove()
    xs = [torch.cat(parts[e]) for e in range(4)]
    ws = [experts.down_proj[e].detach().double() for e in range(4)]
    rows = sum(map(len, xs))
    if method == "wanda":
        scores = sum(by_hand(method, x, w, [[u] for u in range(48)]) for x, w in zip(xs, ws))
    elif method == "flap":
        scores = sum(by_hand(method, x, w, [[u] for u in range(48)]) * len(x) / rows for x, w in zip(xs, ws) if len(x))
    else:
        norms = torch.cat([x.abs() * w.norm(dim=0) for x, w in zip(xs, ws)])
        scores = norms.sum(0) / (norms != 0).sum(0).clamp_min(1)
    agrees(method, graph, group, batches, scores)


class Spellings(nn.Module):
    """The same layer behind the same neurons, as other ops."""

    def __init__(self, op: str):
        super().__init__()
        self.op = op
        self.up, self.down = nn.Linear(6, 7), nn.Parameter(torch.empty(7, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(x))
        if self.op == "linear":
            return F.linear(hidden, self.down.T)
        if self.op == "matmul":
            return hidden @ self.down
        if self.op == "left":
            return (self.down.T @ hidden.transpose(1, 2)).transpose(1, 2)
        if self.op == "bmm":
            return torch.bmm(hidden, self.down[None].expand(hidden.shape[0], -1, -1))
        if self.op == "batched":
            return torch.matmul(hidden, self.down[None])
        return (hidden[..., None] * self.down).sum(2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("op", ["matmul", "left", "batched", "sum"])
def test_the_spelling_of_a_layer_does_not_matter(method, op):
    """A sum of products has terms of its own, and only wanda, which is no function of the terms, tells it apart."""
    batches = [Batch({"x": torch.randn(5, 8, 6)}) for _ in range(2)]
    found = []
    for one in ("linear", op):
        graph = capture(randomise(Spellings(one)), torch.randn(3, 8, 6))
        (group,) = [g for g in find_groups(infer(graph)) if g.size == 7]
        found.append(score(method, graph, [group], batches)[group.name])
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)
    assert found[0].order == found[1].order


class TwoReaders(nn.Module):
    """Neurons that two layers read."""

    def __init__(self):
        super().__init__()
        self.up, self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 3), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.up(x))
        return {"one": self.one(hidden), "two": self.two(hidden)}


@pytest.mark.parametrize("method", METHODS)
def test_sinks_of_a_group_add_up(method):
    model = randomise(TwoReaders())
    graph = capture(model, torch.randn(4, 6))
    (group,) = find_groups(infer(graph))
    assert len(group.gates) == 2
    x = torch.randn(30, 6)
    hidden = torch.relu(model.up(x)).detach().double()
    units = [[u] for u in range(9)]
    want = sum(by_hand(method, hidden, layer.weight.detach().double(), units) for layer in (model.one, model.two))
    agrees(method, graph, group, [Batch({"x": x[:10]}), Batch({"x": x[10:]})], want)


def test_flap_trades_all_groups_by_one_threshold():
    """What a unit costs, over the parameters that it owns, is its standardised score plus one constant."""
    graph, groups = scored("bert")
    rankings = score("flap", graph, groups, batches_of("bert", graph))
    owned = {g.name: sum(s.numel() for s in member_slices(graph, g)) for g in groups}
    standard = []
    for g in groups:
        losses = torch.tensor(rankings[g.name].losses, dtype=torch.float64)
        standard.append((losses[:-1] - losses[1:]) * g.size / owned[g.name] * sum(owned.values()))
    means = torch.stack([one.mean() for one in standard])
    assert torch.allclose(means, means[0].expand(len(means)), rtol=1e-6)
    assert torch.allclose(torch.stack([one.std() for one in standard]), torch.ones(len(means), dtype=torch.float64))
    assert min(float(one.min()) for one in standard) == pytest.approx(0, abs=1e-9)


def test_padding_changes_nothing():
    graph, groups = scored("llama")
    short = {k: v for k, v in text_batch(4, 6).items() if k != "token_type_ids"}
    padded = {k: F.pad(v, (0, 5)) for k, v in short.items()}
    for method in METHODS:
        one, two = (score(method, graph, groups, check_batches(graph, [b])) for b in (short, padded))
        for group in groups:
            assert one[group.name].losses == pytest.approx(two[group.name].losses, rel=1e-3, abs=1e-6)


def test_activations_that_are_not_finite_name_the_layer():
    graph = scored("mlp")[0].copy()
    graph.set_tensor("up.weight", nn.Parameter(graph.tensor("up.weight").detach() * 1e38))
    (group,) = find_groups(infer(graph))
    batches = check_batches(graph, [{"x": torch.full((2, 12), 1e30)}])
    for method in METHODS:
        with pytest.raises(CalibrationError, match="linear_1 is not finite|activations at .* are not finite"):
            score(method, graph, [group], batches)


def test_what_is_read_sums_to_what_the_op_gives():
    """For every sink of every group of some models: the terms add up to the node's own result."""
    for name in ("mlp", "bert", "einsum", "bmm", "three"):
        graph, groups = scored(name)
        (padded,) = batches_of(name, graph, count=1, labels=False)
        batches = [Batch({k: torch.ones_like(v) if k == "attention_mask" else v for k, v in padded.inputs.items()})]
        sums: dict[str, list[torch.Tensor]] = {}

        def visit(sink, terms, sums=sums):
            whole = terms.x @ terms.weight if terms.weight is not None else terms.x.sum(1)
            sums.setdefault(sink.node.name, []).append(whole.double())

        read_contractions(graph, [s for g in groups for s in g.gates], batches, lambda done, of: None, visit)
        seen = {}

        class Keep(torch.fx.Interpreter):
            def run_node(self, n, seen=seen, sums=sums):
                result = super().run_node(n)
                if n.name in sums:
                    bias = n.args[2] if n.target is torch.ops.aten.linear.default and len(n.args) > 2 else None
                    seen[n.name] = result - self.env[bias] if bias is not None else result
                return result

        with torch.no_grad():
            Keep(graph.module).run(*(batches[0].inputs[k] for k in graph.inputs))
        for node, parts in sums.items():
            got, want = torch.cat(parts).flatten(), seen[node].double().flatten()
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
