"""Which layers are refitted, with which residuals and neighbours, and why the others are not."""

import torch
import transformers
from torch import nn

from checks import bert_graph, randomise
from refit_models import cut_by, half, llama_graph, plain_graph
from tilecut_passes.capture import capture
from tilecut_passes.refit_sites import Kept, blocks_of, find_changed, find_sites
from zoo import TEXT

LAYER = "encoder.layer"


def sites_of(dense, plan, told=True):
    cut = cut_by(dense, plan)
    kept = Kept.of(dense, plan) if told else None
    sites, refusals = find_sites(dense, cut, kept, *find_changed(dense, cut, kept))
    return cut, sites, refusals


def test_every_layer_after_the_first_cut_is_a_site():
    cut, sites, refusals = sites_of(bert_graph(), half(bert_graph()))
    names = [s.layer.weight.removeprefix(f"{LAYER}.").removesuffix(".weight") for s in sites]
    assert names == [
        "0.attention.output.dense", "0.intermediate.dense", "0.output.dense",
        "1.attention.self.query", "1.attention.self.key", "1.attention.self.value",
        "1.attention.output.dense", "1.intermediate.dense", "1.output.dense", "pooler.dense",
    ]  # fmt: skip
    assert not refusals
    assert [bool(s.residuals) for s in sites] == ["output" in n for n in names]
    blocks = [[s.layer.weight.split(".")[-2] for s in block] for block in blocks_of(sites, cut)]
    assert blocks == [["dense"], ["dense"], ["dense"], ["query", "key", "value"], ["dense"], ["dense"], ["dense"], ["dense"]]


def test_outputs_that_stay_are_those_of_the_plan():
    dense = llama_graph()
    _, sites, _ = sites_of(dense, half(dense))
    by_name = {s.layer.weight.removesuffix(".weight"): s for s in sites}
    # 4 KV groups of 2 queries of 8: the first two groups, and of each the first query.
    q = by_name["model.layers.1.self_attn.q_proj"].outputs
    assert q.tolist() == [*range(8), *range(16, 24)]
    assert by_name["model.layers.1.self_attn.k_proj"].outputs.tolist() == list(range(16))
    assert by_name["model.layers.1.mlp.up_proj"].outputs.tolist() == list(range(24))
    assert by_name["model.layers.1.mlp.down_proj"].outputs is None
    assert by_name["lm_head"].outputs is None and not by_name["lm_head"].residuals


def test_without_a_plan_layers_that_lost_outputs_are_refused():
    dense = llama_graph()
    _, sites, refusals = sites_of(dense, half(dense), told=False)
    assert {s.layer.weight.split(".")[-2] for s in sites} == {"o_proj", "down_proj", "lm_head"}
    assert {r.why for r in refusals} == {"it lost outputs, and which is not known without the plan"}


def test_a_sum_of_several_branches_has_several_residuals():
    """GPT-J adds attention and FFN to the stream in one expression."""
    config = transformers.GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    dense = capture(randomise(transformers.GPTJForCausalLM(config)))
    _, sites, _ = sites_of(dense, half(dense))
    attention, ffn = (next(s for s in sites if s.layer.weight.endswith(end)) for end in ("out_proj.weight", "fc_out.weight"))
    # The stream before the layer is not known to have moved; attention has run when the FFN is solved.
    assert attention.node in ffn.residuals
    assert len(ffn.residuals) == len(attention.residuals) + 1


def test_what_comes_before_the_cut_has_not_changed():
    dense = bert_graph()
    plan = half(dense)
    cut = cut_by(dense, plan)
    changed, narrowed = find_changed(dense, cut, Kept.of(dense, plan))
    first = next(n for n in cut.nodes if n in changed)
    assert first in narrowed
    assert f"{LAYER}.0.attention.output.dense.weight" in [str(x.target) for x in first.all_input_nodes]
    assert len(narrowed) == 4
    assert find_changed(dense, cut, None)[0] == changed


def test_a_model_that_lost_nothing_has_no_sites():
    dense = plain_graph("gated")
    assert find_changed(dense, dense.copy(), None) == (set(), set())


class Spellings(nn.Module):
    """Contractions of cut units that have no closed form here: a transposed convolution, a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(4, 8, 1)
        self.back, self.down = nn.ConvTranspose1d(8, 4, 3), nn.Parameter(torch.empty(4, 8))

    def forward(self, x):
        inner = torch.relu(self.up(x))
        return self.back(inner), inner.transpose(1, 2) @ (2 * self.down).T


def test_other_spellings_are_refused_with_the_reason():
    dense = capture(randomise(Spellings()), torch.randn(2, 4, 9))
    plan = half(dense)
    assert [g.size for g in plan.groups] == [8]
    for told in (True, False):
        _, sites, refusals = sites_of(dense, plan, told)
        assert not sites
        assert {r.why for r in refusals} == {"no dense layer, convolution or product with experts: left as it is"}
        # Without a plan, a computed weight is not seen to have lost anything.
        assert len(refusals) == (2 if told else 1)


def test_tied_heads_are_left_alone():
    config = transformers.BertConfig(**TEXT)
    dense = capture(randomise(transformers.BertForMaskedLM(config)))
    _, sites, refusals = sites_of(dense, half(dense))
    assert "cls.predictions.transform.dense.weight" in [s.layer.weight for s in sites]
    assert [r.why for r in refusals] == ["its weight or bias is shared"]
