"""Encoder-decoders in two: what each half takes and gives, numbers as the whole's, cut models, and what is no such model."""

import pytest
import torch
import transformers
from torch import nn

import zoo
from checks import random_plan, randomise
from generation_models import PAIR, PAIRS, VOCAB, decoder, pair
from tilecut_passes.add_cache import AddCache
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_passes.split_encoder import split_encoder
from tilecut_runtime.errors import LoweringError


def halves(graph: Graph) -> tuple[Graph, Graph]:
    made = graph.copy()
    run_passes(made, [FuseAttention()])
    found = split_encoder(made)
    assert found is not None
    return found


def inputs_of(graph: Graph, batch: int = 3, tokens: int = 9) -> dict[str, torch.Tensor]:
    """A ragged batch; the encoder reads another number of tokens than the decoder."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for spec in graph.input_specs():
        sizes = {"batch": batch, "sequence": 13, "decoder_sequence": tokens}
        shape = [s if isinstance(s, int) else sizes[s] for s in spec.shape]
        if spec.dtype.startswith("float"):
            out[spec.name] = torch.randn(shape, generator=generator)
        elif "mask" in spec.name:
            out[spec.name] = (torch.arange(shape[1]) < torch.tensor([13, 4, 7])[:, None]).long()
        else:
            out[spec.name] = torch.randint(3, VOCAB, shape, generator=generator)
    return out


def steps_error(graph: Graph, encoder: Graph, steps: Graph) -> float:
    """The largest error of the logits of two steps behind an encoder that ran once; NaN where nothing was written."""
    inputs = inputs_of(graph)
    want = graph.run(inputs)["logits"]
    encoded = encoder.run({name: inputs[name] for name in encoder.inputs})
    ids, specs = inputs["decoder_input_ids"], {spec.name: spec for spec in steps.input_specs()}
    shapes = {name: (3, specs[name].shape[1], 12, specs[name].shape[3]) for name in steps.states}
    caches = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    past, lengths, worst = torch.zeros(3, dtype=torch.int64), torch.tensor([5, 2, 4]), 0.0
    for _ in range(4):
        places = past[:, None] + torch.arange(int(lengths.max()))
        given = {"decoder_input_ids": ids.gather(1, places), "past_lengths": past, "lengths": lengths}
        out = steps.run({**given, **caches, **encoded})
        past, lengths = past + lengths, torch.ones_like(lengths)
        caches = {name: out[present] for name, present in steps.states.items()}
        rows = want[torch.arange(3), past - 1]
        worst = max(worst, float((out["logits"][:, 0] - rows).abs().max() / want.abs().max()))
    return worst


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_that_runs_once_and_steps_equal_the_whole(name):
    graph = capture(pair(name))
    encoder, rest = halves(graph)
    assert set(encoder.inputs) == set(graph.inputs) - {"decoder_input_ids"}
    crossing = tuple(n for n in rest.inputs if n != "decoder_input_ids")
    assert encoder.outputs == crossing and rest.outputs == ("logits",)
    wanted = {f"cross.{i}.{part}" for i in range(2) for part in ("key", "value")}
    assert set(crossing) == wanted | ({"cross.mask"} if "attention_mask" in graph.inputs else set())
    run_passes(rest, [AddCache(64)])
    assert list(rest.states) == [f"past_key_values.{i}.{p}" for i in range(2) for p in ("key", "value")]
    assert steps_error(graph, encoder, rest) < 2e-5


def test_the_whole_is_left_as_it_is():
    graph = capture(pair("mbart"))
    run_passes(graph, [FuseAttention()])
    before = [(n.name, n.args) for n in graph.nodes], graph.inputs, graph.outputs, dict(graph.dims)
    assert split_encoder(graph) is not None
    assert before == ([(n.name, n.args) for n in graph.nodes], graph.inputs, graph.outputs, dict(graph.dims))


@pytest.mark.parametrize("seed", range(2))
def test_heads_and_widths_are_those_that_pruning_left(seed):
    graph = capture(pair("mbart"))
    run_passes(graph, [Prune(random_plan(graph, seed, "heads", "neurons", "qk_width", "vo_width"))])
    encoder, rest = halves(graph)
    run_passes(rest, [AddCache(64)])
    assert steps_error(graph, encoder, rest) < 2e-5


def test_a_mask_of_the_decoders_tokens_stays_with_the_decoder():
    ids, others = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    example = {
        "input_ids": ids,
        "attention_mask": ids.clone(),
        "decoder_input_ids": others,
        "decoder_attention_mask": others.clone(),
    }
    graph = capture(pair("mbart"), example)
    encoder, rest = halves(graph)
    assert set(encoder.inputs) == {"input_ids", "attention_mask"} and "decoder_attention_mask" in rest.inputs
    run_passes(rest, [AddCache(64)])
    assert "decoder_attention_mask" not in rest.inputs
    whole = capture(pair("mbart"))
    assert steps_error(whole, encoder, rest) < 2e-5


class TwoSequences(nn.Module):
    """Tokens that look at themselves and at two other sequences, one of which a convolution makes shorter."""

    def __init__(self, strided: bool = False):
        super().__init__()
        self.words, self.layers = nn.Embedding(VOCAB, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.short, self.head = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Linear(64, VOCAB)
        self.strided = strided

    def forward(self, a, target, b):
        heads = lambda x: x.unflatten(-1, (4, 16)).transpose(1, 2)
        y, first, second = (self.words(x) for x in (target, a, b))
        if self.strided:
            first = self.short(first.transpose(1, 2)).transpose(1, 2)
        for i, memory in enumerate((None, first, second)):
            x = y if memory is None else memory
            q, k = heads(self.layers[2 * i](y)), heads(self.layers[2 * i + 1](x))
            out = nn.functional.scaled_dot_product_attention(q, k, heads(x), is_causal=memory is None)
            y = y + out.transpose(1, 2).flatten(2)
        return self.head(y)


def two(strided: bool = False, lengths: tuple[str, str, str] = ("a", "target", "b")) -> Graph:
    ids = {name: torch.randint(0, VOCAB, (2, n)) for name, n in zip(("a", "target", "b"), (7, 5, 9))}
    if len(set(lengths)) < 3:
        ids["a"] = torch.randint(0, VOCAB, (2, 5))
    shapes = {name: {0: "batch", 1: size} for name, size in zip(ids, lengths)}
    graph = capture(randomise(TwoSequences(strided).eval()), ids, shapes)
    run_passes(graph, [FuseAttention()])
    return graph


def test_two_other_sequences():
    graph = two()
    found = split_encoder(graph)
    assert found is not None
    encoder, rest = found
    assert encoder.inputs == ("a", "b") and rest.inputs[0] == "target"
    ids = {name: torch.randint(0, VOCAB, (2, n)) for name, n in (("a", 3), ("target", 8), ("b", 6))}
    given = encoder.run({name: ids[name] for name in encoder.inputs})
    got = rest.run({"target": ids["target"], **given})
    torch.testing.assert_close(got["output"], graph.run(ids)["output"])


def test_sizes_that_cannot_be_told_apart_are_refused():
    with pytest.raises(LoweringError, match="a, which the encoder reads, has the length of target; .* dynamic_shapes"):
        split_encoder(two(lengths=("target", "target", "b")))
    with pytest.raises(LoweringError, match="has a length that the encoder computes; .* fixed length"):
        split_encoder(two(strided=True))


def test_what_has_one_sequence_is_not_split():
    for model in (decoder("llama"), randomise(zoo.ZOO["bert"].build())):
        graph = capture(model)
        run_passes(graph, [FuseAttention()])
        assert split_encoder(graph) is None


def test_positions_that_the_ids_decide_are_refused():
    config = transformers.M2M100Config(**PAIR, max_position_embeddings=64)
    graph = capture(randomise(transformers.M2M100ForConditionalGeneration(config).eval()))
    _, rest = halves(graph)
    with pytest.raises(LoweringError, match=r"cumsum\w*: \(aten.cumsum.default\) may mix tokens"):
        run_passes(rest, [AddCache(64)])
