"""Encoder-decoders in two: what each half takes and gives, numbers as the whole's, cut models, and what is no such model."""

import pytest
import torch
import transformers

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
