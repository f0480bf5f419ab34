"""Generation where OpenVINO holds the cache: torch's greedy texts, quantized, other streams beside, what is refused."""

import numpy as np
import pytest
import torch

import zoo
from checks import randomise
from generation_models import calm, decoder, greedy, pair
from test_generate import PROMPTS, padded
from tilecut import PruneConfig, compile_pruned, load
from tilecut_passes.add_cache import AddCache
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.grow_cache import GrowCache
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import ArtifactError, InputError, LoweringError
from tilecut_runtime.reference import verify_on_device

pytest.importorskip("openvino")


@pytest.mark.parametrize("name", ["opt", "bloom", "mistral", "gemma2"])
def test_growing_steps_equal_the_whole_text(name):
    """Positions counted off the mask, ALiBi, a window, a window beside a soft-cap; rows padded on the left, in another order."""
    graph = capture(randomise(zoo.ZOO[name].build()) if name in ("opt", "bloom") else decoder(name))
    made = graph.copy()
    run_passes(made, [FuseAttention(), AddCache(64), GrowCache()])
    assert set(made.inputs) == {"input_ids", "attention_mask", "position_ids", "beam_idx", *made.states}
    assert GrowCache()(made) == 0
    lengths = torch.tensor([9, 4, 12])
    ids = torch.randint(3, 90, (3, 16), generator=torch.Generator().manual_seed(0))
    want = graph.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
    place = torch.arange(12) - (12 - lengths)[:, None]
    specs = {spec.name: spec for spec in made.input_specs()}
    caches = {n: torch.zeros(3, specs[n].shape[1], 0, specs[n].shape[3]) for n in made.states}
    mask, positions, beams = (place >= 0).long(), place.clamp(min=0), torch.arange(3)
    for step in range(4):
        tokens = ids.gather(1, positions)
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "beam_idx": beams.int()}
        out = made.run({**given, **caches})
        rows = want[torch.arange(3), lengths - 1 + step]
        assert float((out["logits"][:, 0] - rows).abs().max() / want.abs().max()) < 1e-5
        caches = {n: out[present] for n, present in made.states.items()}
        # After the second step rows change places; their caches follow by beam_idx.
        beams = torch.tensor([2, 0, 1]) if step == 1 else torch.arange(3)
        lengths, ids, mask, want = lengths[beams], ids[beams], mask[beams], want[beams]
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        positions = (lengths + step)[:, None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = decoder("llama")
    folder = tmp_path_factory.mktemp("openvino") / "llama"
    artifact = compile_pruned(model, "edge:openvino", config=None, output=folder, generate=True, measure=False)
    return artifact, model


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_greedy_texts_are_torchs(llama, name, tmp_path):
    artifact, model = llama
    if name != "llama":
        model = decoder(name)
        artifact = compile_pruned(model, "edge:openvino", config=None, output=tmp_path / name, generate=True, measure=False)
    session = load(artifact.path, threads=1)
    want = greedy(lambda ids: model(input_ids=ids).logits, PROMPTS, 64)
    assert session.generate(PROMPTS, max_new_tokens=64, eos=()).tokens == want
    for left in (False, True):
        assert session.generate(*padded(left), max_new_tokens=64, eos=()).tokens == want


def test_rows_end_where_they_should_and_streams_do_not_meet(llama):
    session = load(llama[0].path)
    whole = session.generate(PROMPTS, max_new_tokens=20, eos=()).tokens
    got = session.generate(PROMPTS, max_new_tokens=20, eos=whole[0][6]).tokens
    for row, tokens in zip(got, whole):
        assert row == (tokens[: tokens.index(whole[0][6]) + 1] if whole[0][6] in tokens else tokens)
    one, two = (session.stream(PROMPTS[i : i + 1], max_new_tokens=20, eos=()) for i in (0, 1))
    pairs = list(zip(one, two))
    assert [a.tokens[0] for a, _ in pairs] == whole[0] and [b.tokens[0] for _, b in pairs] == whole[1]
    # A run begins with empty caches, whatever ran before.
    ids = np.array([PROMPTS[0]])
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    first, second = (session.run(given)["logits"] for _ in range(2))
    assert np.array_equal(first, second) and int(first[0, 0].argmax()) == whole[0][0]


def test_the_ladder_has_a_rung_for_decoding(llama):
    artifact, _ = llama
    rungs = {r.name: r.status for r in artifact.manifest.verification}
    assert rungs["steps equal the whole text"] == rungs["decoding equals reference"] == "passed"
    assert {r.name for r in artifact.verify()} >= {"openvino IR", "decoding equals reference"}
    assert [r.name for r in verify_on_device(artifact.path)][-1] == "decoding equals reference"
    assert artifact.manifest.generation.stateful and not artifact.manifest.generation.states
    assert [spec.name for spec in artifact.manifest.outputs] == ["logits"]


def test_four_bits(tmp_path):
    config = PruneConfig(quantize="int4", sparsity=0.0)
    model = calm(decoder("llama"))
    artifact = compile_pruned(model, "edge:openvino", config=config, output=tmp_path / "q", generate=True, measure=False)
    assert {r.name: r.status for r in artifact.manifest.verification}["decoding equals reference"] == "passed"
    tokens = load(artifact.path).generate(PROMPTS, max_new_tokens=20, eos=()).tokens
    assert [len(row) for row in tokens] == [20] * 4


def test_refusals(llama, tmp_path):
    with pytest.raises(LoweringError, match="the edge:openvino target writes decoders alone; got an encoder-decoder"):
        compile_pruned(pair("mbart"), "edge:openvino", config=None, output=tmp_path / "out", generate=True, measure=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="onnxruntime-genai reads ONNX files; got an artifact for edge:openvino"):
        llama[0].write_genai(tmp_path / "genai")
    session = load(llama[0].path)
    with pytest.raises(InputError, match="row 0 is longer than the model's positions; got 129"):
        session.generate([3] * 129)
    with pytest.raises(InputError, match="the model has no encoder; got decoder_input_ids"):
        session.generate([3], decoder_input_ids=[3])
