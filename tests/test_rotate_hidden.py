"""The hidden width in another basis: the same function, cut like any other, and less lost where the stream is narrow."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers as hf

from checks import groups_of, randomise
from moe_models import EXPERTS
from test_models import made
from tilecut import PruneConfig, compile_pruned, from_pretrained, load
from tilecut.make_cases import make_inputs
from tilecut.recovery_config import Recovery
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import check_batches
from tilecut_passes.capture import capture
from tilecut_passes.find_stream import CannotRotate, find_stream
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.plan import ROTATIONS, PrunePlan
from tilecut_passes.project_outputs import ProjectOutputs
from tilecut_passes.prune import Prune
from tilecut_passes.rotate_hidden import RotateHidden, principal_basis
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import PlanError
from zoo import GQA

# RMS norms, tied heads, experts, LayerNorms with and without biases, parallel branches, an encoder that returns its stream.
TURNED = ("llama_gqa", "llama_tied", "qwen3", "mixtral", "t5", "gpt2", "mpt", "gptj", "falcon_gqa", "deit", "deepseek_v3")
# A norm's weight scales the stream itself; a head reads it without a norm; an activation sees each channel.
STRAIGHT = {
    "bert": "which the weight of a norm has scaled, to the stream",
    "gemma2": "which the weight of a norm has scaled, to the stream",
    "hand_gpt": "reads the stream without a norm",
    "linear_attention": "works on single channels",
}
SHAPES = ((2, 9), (3, 13))


@functools.lru_cache(maxsize=4)
def graph_of(name: str) -> Graph:
    graph = capture(randomise(EXPERTS[name]())) if name in EXPERTS else capture(*made(name))
    run_passes(graph, [ProjectOutputs()])
    return graph


def basis_of(width: int, seed: int = 0) -> torch.Tensor:
    square = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square)[0].float()


def turned(graph: Graph, seed: int = 0) -> tuple[Graph, dict[str, torch.Tensor]]:
    bases = {g.name: basis_of(g.size, seed) for g in groups_of(graph, "hidden") if can_be_turned(graph, g.name)}
    other = graph.copy()
    run_passes(other, [RotateHidden(bases)])
    return other, bases


def can_be_turned(graph: Graph, name: str) -> bool:
    """DeepSeek's compressed keys share a matrix with others; its stream is another group."""
    try:
        return bool(find_stream(graph, name))
    except CannotRotate:
        return False


def narrow_llama(width: int) -> hf.LlamaForCausalLM:
    """A LLaMA whose stream is in a subspace of `width` dimensions, along no channel."""
    model = randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)))
    basis = basis_of(GQA["hidden_size"])[:, :width]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.copy_(weight @ basis @ basis.T)
            elif "o_proj" in name or "down_proj" in name:
                weight.copy_(basis @ basis.T @ weight)
    return model


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    seeds = (torch.Generator().manual_seed(i) for i in range(count))
    ids = [torch.randint(0, GQA["vocab_size"], (4, 16), generator=seed) for seed in seeds]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


@pytest.mark.parametrize("name", TURNED)
def test_a_turned_model_computes_the_same(name):
    graph = graph_of(name)
    other, bases = turned(graph)
    assert other.rotated == tuple(bases) and not graph.rotated
    moved = [n for n, x in graph.tensors.items() if not torch.equal(x, other.tensor(n))]
    assert moved
    for i, shape in enumerate(SHAPES):
        inputs = make_inputs(graph, *shape, seed=i)
        assert largest_error(graph.run(inputs), other.run(inputs)) <= 2e-5
    again = other.copy()
    assert RotateHidden(bases)(again) == 0


@pytest.mark.parametrize("name", TURNED)
def test_masked_equals_cut_in_the_turned_basis(name, tmp_path):
    """The plan goes through its files, and to a graph that is as it was captured."""
    graph = graph_of(name)
    other, bases = turned(graph)
    groups = [g for g in groups_of(other, "hidden", "neurons") if g.kind == "neurons" or g.size == 32]
    kept = {g.name: list(range(g.size // 2)) if g.kind == "hidden" else range(0, g.size, 2) for g in groups}
    plan = PrunePlan.keep_all(other, groups).keeping(kept)
    plan = replace(plan, rotations=bases)
    plan.write(tmp_path / "plan.json")
    plan = PrunePlan.read(tmp_path / "plan.json")
    assert all(torch.equal(plan.rotations[n], x) for n, x in bases.items())
    masked, cut = graph.copy(), graph.copy()
    run_passes(masked, [Mask(plan)])
    run_passes(cut, [Prune(plan)])
    for i, shape in enumerate(SHAPES):
        inputs = make_inputs(graph, *shape, seed=i)
        want = masked.run(inputs)
        assert largest_error(want, cut.run(inputs)) <= 2e-5
        assert largest_error(want, graph.run(inputs)) > 1e-3


@pytest.mark.parametrize("name", STRAIGHT)
def test_streams_that_cannot_be_turned_say_why(name):
    graph = graph_of(name)
    (group, *_) = groups_of(graph, "hidden")
    with pytest.raises(CannotRotate, match=STRAIGHT[name]):
        find_stream(graph, group.name)
    with pytest.raises(PlanError, match="cannot be turned"):
        RotateHidden({group.name: basis_of(group.size)})(graph.copy())


def test_the_principal_basis_is_that_of_what_readers_see():
    model = narrow_llama(12)
    graph = capture(model)
    (group,) = groups_of(graph, "hidden")
    basis, energies = principal_basis(graph, group.name, check_batches(graph, batches()), lambda done, of: None)
    eye = torch.eye(group.size)
    assert torch.allclose(basis.T @ basis, eye, atol=1e-5)
    assert energies[12:].sum() <= 1e-6 * energies.sum() and (energies[:-1] >= energies[1:]).all()
    # Every norm gives rows of length sqrt(H); queries, keys and values read the same ones, gate and up too, the head others.
    rows = sum(x["input_ids"].numel() for x in batches())
    assert float(energies.sum()) == pytest.approx(rows * 5 * group.size, rel=1e-3)


def test_a_narrow_stream_is_cut_without_loss(tmp_path):
    model, width = narrow_llama(16), 16
    dense = capture(model)
    inputs = batches(1)[0]
    want = dense.run(inputs)["logits"]
    errors = {}
    for rotate in (True, False):
        config = PruneConfig(kinds=("hidden",), sparsity=0.0, max_units={"hidden": width}, rotate=rotate, cache="")
        artifact = compile_pruned(model, "edge", None, batches(), config, tmp_path / f"{rotate}", measure=False)
        (group,) = artifact.plan.groups
        assert (len(group.kept), bool(artifact.plan.rotations)) == (width, rotate)
        with torch.no_grad():
            errors[rotate] = largest_error({"logits": want}, artifact.module()(**inputs))
        rungs = {r.name: r.status for r in artifact.manifest.verification}
        assert rungs.get("turned equals dense") == ("passed" if rotate else None)
        assert rungs["cut equals masked dense"] == rungs["artifact equals pruned model"] == "passed"
    assert errors[True] <= 0.05 < 0.2 < errors[False]


def test_a_hidden_width_that_stays_is_not_turned(tmp_path):
    model = made("llama_tied")[0]
    config = PruneConfig(kinds=("hidden", "neurons"), sparsity=0.1, min_units={"hidden": 32}, cache="")
    artifact = compile_pruned(model, "edge", None, batches(), config, tmp_path / "out", measure=False)
    assert not artifact.plan.rotations and not (artifact.path / ROTATIONS).exists()
    dense = capture(model)
    assert artifact.report["parameters"]["dense"] == sum(x.numel() for x in dense.tensors.values() if x.is_floating_point())
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(tied & set(dense.tensors)) == len(tied & set(artifact.module().state_dict())) == 1


def test_a_plan_of_a_tied_model_applies_to_a_fresh_capture(tmp_path):
    model = made("llama_tied")[0]
    config = PruneConfig(kinds=("hidden", "heads"), max_units={"hidden": 16}, sparsity=0.3, reconstruct=False, cache="")
    artifact = compile_pruned(model, "edge", None, batches(), config, tmp_path / "out", measure=False)
    assert artifact.plan.rotations
    # The table and the head are two tensors now, each under its own name.
    held = artifact.module().state_dict()
    assert held["lm_head.weight"].shape == held["model.embed_tokens.weight"].shape == (99, 16)
    assert not torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    fresh = capture(model)
    run_passes(fresh, [Prune(artifact.plan)])
    inputs = batches(1)[0]
    with torch.no_grad():
        assert largest_error(artifact.module()(**inputs), fresh.run(inputs)) <= 1e-5


def test_a_turned_model_in_transformers(tmp_path):
    """Saved and loaded, although its config says that the tables are tied."""
    model = made("llama_tied")[0]
    config = PruneConfig(kinds=("hidden",), max_units={"hidden": 16}, sparsity=0.0, cache="")
    artifact = compile_pruned(model, "edge", None, batches(), config, tmp_path / "out", measure=False)
    inputs = batches(1)[0]
    with torch.no_grad():
        want = artifact.module()(**inputs)["logits"]
        assert torch.equal(artifact.hf_model()(**inputs).logits, want)
        artifact.hf_model().save_pretrained(tmp_path / "hf")
        assert torch.equal(from_pretrained(tmp_path / "hf")(**inputs).logits, want)
    assert (tmp_path / "hf" / ROTATIONS).read_bytes() == (tmp_path / "out" / ROTATIONS).read_bytes()


@pytest.mark.parametrize("kinds", [("hidden",), ("hidden", "vocab")])
def test_generation_with_a_turned_model(kinds, tmp_path):
    model = made("llama_tied")[0]
    words = tuple(range(0, 99, 2)) if "vocab" in kinds else None
    config = PruneConfig(kinds=kinds, max_units={"hidden": 16}, vocabulary=words, sparsity=0.0, cache="")
    artifact = compile_pruned(
        model, "edge", None, batches(), config, tmp_path / "out", measure=False, generate=True, max_length=32
    )
    ids = batches(1)[0]["input_ids"][:2, :5]
    module, want = artifact.module(), ids
    with torch.no_grad():
        for _ in range(8):
            logits = module(input_ids=want, attention_mask=torch.ones_like(want))["logits"][:, -1:]
            want = torch.cat([want, logits.argmax(-1)], 1)
    got = load(tmp_path / "out").generate(ids.numpy(), max_new_tokens=8, eos=())
    assert [list(row) for row in got.tokens] == want[:, 5:].tolist()


class Shifted(torch.nn.Module):
    """A pre-norm stream that a number, or the weight of a norm, is added to."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.table = what, torch.nn.Embedding(50, 32)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(32) for _ in range(2))
        self.up, self.down, self.head = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 7)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norms[0](x))))
        x = x + (1.0 if self.what == "number" else self.norms[0].weight)
        return self.head(self.norms[1](x))


@pytest.mark.parametrize(
    ("what", "why"), [("number", "works on single channels"), ("weight", "is more than the weight of a norm")]
)
def test_what_is_added_to_the_stream_is_turned_with_it_or_refused(what, why):
    graph = capture(randomise(Shifted(what)), torch.randint(0, 50, (2, 9)))
    (group,) = groups_of(graph, "hidden")
    with pytest.raises(CannotRotate, match=why):
        find_stream(graph, group.name)


def test_several_cuts_of_a_turned_model_with_words_that_go(tmp_path):
    config = PruneConfig(
        kinds=("hidden", "vocab"), max_units={"hidden": 16}, vocabulary=tuple(range(0, 99, 2)), sparsity=0.2, cache="",
        finetune=Recovery(epochs=1, steps=2), at={"sequence": 16},
    )  # fmt: skip
    artifact = compile_pruned(made("llama_tied")[0], "edge", None, batches(), config, tmp_path / "out", measure=False)
    assert artifact.plan.rotations
    assert all(r.status == "passed" for r in artifact.manifest.verification)


def test_bad_bases_and_plans(tmp_path):
    graph = graph_of("llama_gqa")
    (group,) = groups_of(graph, "hidden")
    with pytest.raises(PlanError, match=r"has another width; got \[8, 8\]; wanted \[32, 32\]"):
        RotateHidden({group.name: basis_of(8)})(graph.copy())
    other, bases = turned(graph)
    plain = PrunePlan.keep_all(graph, find_groups(infer(graph)))
    with pytest.raises(PlanError, match="has been turned"):
        Prune(plain)(other)
    replace(plain, rotations=bases).write(tmp_path / "plan.json")
    (tmp_path / ROTATIONS).write_bytes(b"no tensors")
    with pytest.raises(PlanError, match="not a safetensors file"):
        PrunePlan.read(tmp_path / "plan.json")
    (tmp_path / ROTATIONS).unlink()
    with pytest.raises(PlanError, match="is missing"):
        PrunePlan.read(tmp_path / "plan.json")
