import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checks import TinyMlp, compiled, groups_of, minilm_folder, randomise, text_batch, tiny_bert
from tilecut import PruneConfig, compile_pruned, load
from tilecut.check_cut import check_cut
from tilecut.load_model import load_model
from tilecut.progress import Progress
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    ConfigError,
    TilecutError,
    VerificationError,
)
from tilecut_targets.edge.target import EdgeTarget

X = [{"x": torch.randn(64, 12)} for _ in range(3)]


def mlp(output: Path, **options):
    given = {"config": PruneConfig(sparsity=0.5), "calibration": X, "measure": False, **options}
    return compile_pruned(randomise(TinyMlp(neurons=64)), "edge", torch.randn(4, 12), output=output, **given)


def test_every_stage_leaves_its_trace(edge_artifact):
    report = edge_artifact.report
    assert list(report["seconds"]) == [
        "capture",
        "axes",
        "calibration",
        "score (table)",
        "search",
        "prune",
        "reconstruct",
        "legalize",
        "fuse",
        "choose forms",
        "lower",
        "write",
        "verify",
        "fidelity",
        "latency",
    ]
    macs = report["macs"]
    assert macs["prunable_pruned"] <= 0.5 * macs["prunable_dense"]
    assert report["parameters"]["pruned"] < report["parameters"]["dense"]
    assert {r["status"] for r in report["verification"]} == {"passed"}
    assert {"dense, torch eager", "pruned artifact", "dense, same path"} <= set(report["latency"]["contenders"])
    assert report["lattice"] == EdgeTarget().lattice().describe()
    names = {p.name for p in edge_artifact.path.iterdir()}
    assert {
        "manifest.json",
        "model.onnx",
        "model.safetensors",
        "module.pt2",
        "plan.json",
        "report.json",
        "report.html",
        "ref",
        "config.json",
    } <= names


@pytest.mark.parametrize("which", ["edge_artifact", "cuda_artifact", "ascend_artifact"])
def test_enforcing_rewrites_nothing_on_a_searched_plan(which, request):
    artifact = request.getfixturevalue(which)
    enforcing = [p for p in artifact.report["passes"] if p["name"].startswith("Enforce")]
    assert enforcing
    assert [p["rewrites"] for p in enforcing] == [0] * len(enforcing)
    assert all(g.padded_to is None for g in artifact.plan.groups)
    assert any(len(g.kept) < g.size for g in artifact.plan.groups)


@pytest.mark.parametrize("which", ["edge_artifact", "cuda_artifact", "ascend_artifact"])
def test_module_is_the_pruned_model_and_trains(which, request):
    artifact = request.getfixturevalue(which)
    module = artifact.module()
    inputs = text_batch(3, 20, seed=9)
    session = load(artifact.path, device={"ascend": "reference"}.get(artifact.manifest.target, "cpu"))
    got = session.run({k: v.numpy() for k, v in inputs.items()})
    out = module(**inputs)
    torch.testing.assert_close(out.pooler_output, torch.from_numpy(got["pooler_output"]), rtol=2e-3, atol=2e-3)
    assert set(dict(module.named_parameters())) == set(load_file(artifact.path / "model.safetensors")) - {
        name for name, _ in module.named_buffers()
    }
    before = out.pooler_output.square().mean()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    before.backward()
    # The word embeddings of tokens that are absent have no gradient, but the tensor has one.
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if "key.bias" not in n
    )
    optimizer.step()
    assert module(**inputs).pooler_output.square().mean() < before


def test_the_module_sits_in_another_module(edge_artifact):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = edge_artifact.module()
            self.head = nn.Linear(64, 3)

        def forward(self, **inputs):
            return self.head(self.body(**inputs).last_hidden_state[:, 0])

    model = Classifier()
    assert model(**text_batch(2, 7)).shape == (2, 3)
    assert "body.encoder.layer.0.output.dense.weight" in model.state_dict()
    with pytest.raises(TypeError, match="the model takes input_ids, attention_mask, token_type_ids; got input_ids"):
        model.body(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_dense_compile_keeps_everything(tmp_path):
    artifact = mlp(tmp_path / "dense", config=None)
    assert all(len(g.kept) == g.size for g in artifact.plan.groups)
    assert artifact.report["macs"]["dense"] == artifact.report["macs"]["pruned"]
    assert artifact.report["method"] is None


def test_same_seed_same_artifact(tmp_path):
    first, second = (mlp(tmp_path / name) for name in ("a", "b"))
    assert first.plan == second.plan
    for name in ("model.onnx", "model.safetensors", "plan.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_plain_modules_with_labels_and_the_output_path_from_the_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = [{"x": torch.randn(64, 12), "labels": torch.randint(0, 3, (64,))} for _ in range(3)]
    artifact = compile_pruned(
        randomise(TinyMlp(neurons=64)),
        example_inputs=torch.randn(4, 12),
        calibration=batches,
        config=PruneConfig(method="taylor", sparsity=0.4),
        measure=False,
    )
    assert artifact.path == Path("tinymlp-edge")
    assert set(artifact.report["fidelity"]["task"]) == {
        "dense_loss",
        "pruned_loss",
        "dense_accuracy",
        "pruned_accuracy",
    }


@pytest.mark.parametrize(
    "arguments", [("edge", {"sparsity": 0.9}), ("edge", {"num_heads_keep": 2, "kinds": ("heads",)})]
)
def test_budgets_are_kept(arguments, tmp_path):
    target, config = arguments
    artifact = compiled(target, tmp_path / "a", config=PruneConfig(at={"sequence": 16}, **config))
    macs = artifact.report["macs"]
    if "sparsity" in config:
        assert macs["prunable_pruned"] <= (1 - config["sparsity"]) * macs["prunable_dense"]
    else:
        assert [len(g.kept) for g in artifact.plan.groups] == [2, 2]


def test_without_data_one_warning_and_magnitude(tmp_path):
    with pytest.warns(UserWarning, match="magnitude scores instead of table") as caught:
        artifact = mlp(tmp_path / "a", calibration=None)
    assert len([w for w in caught if "magnitude" in str(w.message)]) == 1
    assert artifact.report["method"] == "magnitude"
    assert "much worse" in artifact.report["notes"][0]


@dataclass(frozen=True)
class CountLinears:
    """A user's pass that looks and changes nothing."""

    def __call__(self, graph: Graph) -> int:
        seen.append(sum(1 for n in graph.nodes if n.target is torch.ops.aten.linear.default))
        return 0


seen: list[int] = []


def test_a_pass_of_the_users_own_runs_on_the_legal_graph(tmp_path):
    artifact = mlp(tmp_path / "a", passes=(CountLinears(),))
    assert seen.pop() == 2
    assert [p["name"] for p in artifact.report["passes"]].index("CountLinears") > 0


def test_a_replaced_artifact_and_nothing_beside_it(tmp_path):
    first = mlp(tmp_path / "a").manifest.created
    (tmp_path / "a" / "left-over.txt").write_text("from before")
    second = mlp(tmp_path / "a", config=None)
    assert not (tmp_path / "a" / "left-over.txt").exists()
    assert second.manifest.created >= first
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def bad_file(path: Path) -> Path:
    path.write_text("a file\n")
    return path


BAD = [
    (lambda d: {"target": "tpu"}, ConfigError, "unknown target; got 'tpu'; wanted 'edge' or 'cuda' or 'ascend'"),
    (lambda d: {"target": "ascend:Ascend999"}, ConfigError, "unknown Ascend chip; got 'Ascend999'"),
    (lambda d: {"config": "mobile"}, ConfigError, "unknown preset; got 'mobile'; wanted 'edge', 'cloud', 'hybrid'"),
    (lambda d: {"model": "no/such/folder"}, CaptureError, "no config.json"),
    (lambda d: {"model": torch.ones(3)}, CaptureError, "not a PyTorch model; got Tensor"),
    (lambda d: {"config": PruneConfig(method="taylor")}, CalibrationError, "method 'taylor' needs labels"),
    (
        lambda d: {"config": PruneConfig(method="taylor"), "calibration": None},
        CalibrationError,
        "method 'taylor' needs calibration batches",
    ),
    (lambda d: {"calibration": [{"y": torch.ones(2, 12)}]}, CalibrationError, "batch 0: input x is missing; got y"),
    (lambda d: {"calibration": [{"x": torch.ones(2, 13)}]}, CalibrationError, "input x has another shape"),
    (lambda d: {"calibration": [{"x": torch.ones(2, 12).long()}]}, CalibrationError, "another dtype; got int64"),
    (lambda d: {"calibration": [{"x": torch.full((2, 12), float("nan"))}]}, CalibrationError, "NaN or infinity"),
    (
        lambda d: {"model": randomise(TinyMlp(neurons=64)).half(), "example_inputs": torch.randn(4, 12).half()},
        CaptureError,
        "up.weight: a weight is not float32; got float16; wanted float32; pass model.float()",
    ),
    (lambda d: {"calibration": []}, CalibrationError, "no batches"),
    (lambda d: {"calibration": 7}, CalibrationError, "neither batches, texts nor a file; got int"),
    (lambda d: {"calibration": ["some", "texts"]}, CalibrationError, "the model takes no input_ids"),
    (lambda d: {"calibration": d / "absent.tsv"}, CalibrationError, "no such calibration file"),
    (lambda d: {"config": PruneConfig(kinds=("heads",))}, ConfigError, "nothing in this model can be cut .heads."),
    (
        lambda d: {"config": PruneConfig(max_params=10)},
        ConfigError,
        "budget of 10 parameters; got the smallest legal one has 259",
    ),
    (lambda d: {"config": PruneConfig(num_heads_keep=2)}, ConfigError, "num_heads_keep is asked for, but no attention"),
    (lambda d: {"config": PruneConfig(attention_sparsity=0.5)}, ConfigError, "attention_sparsity is asked for"),
    (lambda d: {"passes": CountLinears()}, ConfigError, "passes is no sequence of passes; got CountLinears"),
    (lambda d: {"passes": [CountLinears(), 3]}, ConfigError, "passes is no sequence of passes"),
    (lambda d: {"passes": None}, ConfigError, "passes is no sequence of passes; got None"),
    (lambda d: {"progress": print}, ConfigError, "progress is no Progress; got builtin_function"),
    (lambda d: {"output": 3}, ArtifactError, "output: not a path; got int"),
    (lambda d: {"output": ".."}, ArtifactError, "has no name of its own"),
    (lambda d: {"output": "/dev/null/a"}, ArtifactError, "cannot be made .Not a directory"),
    (lambda d: {"example_inputs": torch.ones(2, 5)}, CaptureError, r"checks.py:\d+ `return self.down"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_one_clear_error_and_leaves_nothing(change, kind, message, tmp_path):
    given = {
        "model": randomise(TinyMlp(neurons=64)),
        "target": "edge",
        "example_inputs": torch.randn(4, 12),
        "calibration": X,
        "config": PruneConfig(),
        "output": tmp_path / "out" / "artifact",
        "measure": False,
        **change(tmp_path),
    }
    with warnings.catch_warnings(), pytest.raises(kind, match=message) as caught:
        warnings.simplefilter("ignore")
        compile_pruned(**given)
    assert isinstance(caught.value, TilecutError)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, "half"])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ConfigError, match="bad sparsity"):
        PruneConfig(sparsity=sparsity)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text("mine"), "the output path is a file"),
        (lambda p: (p.mkdir(), (p / "thesis.tex").write_text("mine")), "is not a tilecut artifact"),
        (lambda p: (p.mkdir(), (p / "manifest.json").write_text('{"name": "app"}')), "that is not tilecut's"),
    ],
)
def test_a_folder_that_is_not_ours_is_left_alone(make, message, tmp_path):
    make(tmp_path / "out")
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ArtifactError, match=message):
        mlp(tmp_path / "out")
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


@dataclass(frozen=True)
class Exact(EdgeTarget):
    """Edge with a tolerance that rounding breaks."""

    tolerance = 1e-12


def test_a_failed_verification_fails_the_compile_and_leaves_no_folder(tmp_path):
    with pytest.raises(VerificationError, match="wanted at most 1e-12"):
        compiled(Exact(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_swapped_unit_fails_the_central_check():
    dense = capture(tiny_bert())
    groups = groups_of(dense)
    plan = PrunePlan.keep_all(dense, groups).keeping({groups[0].name: [0, 2], groups[1].name: list(range(16))})
    pruned = dense.copy()
    run_passes(pruned, [Prune(plan)])
    assert check_cut(dense, pruned, plan).status == "passed"
    for swapped in ({groups[0].name: [0, 3]}, {groups[1].name: [*range(15), 16]}):
        with pytest.raises(VerificationError, match="differs from the masked dense one"):
            check_cut(dense, pruned, plan.keeping(swapped))


def test_a_broken_pass_of_the_users_own_leaves_nothing(tmp_path):
    @dataclass(frozen=True)
    class Breaks:
        def __call__(self, graph: Graph) -> int:
            raise RuntimeError("the pass's own bug")

    with pytest.raises((RuntimeError, TilecutError), match="the pass's own bug"):
        mlp(tmp_path / "a", passes=(Breaks(),))
    assert not list(tmp_path.iterdir())


def test_texts_need_the_models_own_tokenizer(tmp_path):
    with pytest.raises(CalibrationError, match="no tokenizer beside it"):
        compiled("edge", tmp_path / "a", calibration=["a text", "another"])


@pytest.mark.slow
def test_the_real_model_for_ascend_with_no_other_argument(tmp_path, monkeypatch):
    import transformers

    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModel.from_pretrained(str(minilm_folder()))
    artifact = compile_pruned(model, target="ascend")
    assert artifact.path == Path("bertmodel-ascend")
    assert artifact.report["config"]["sparsity"] == 0.4
    assert "WordNet" in artifact.report["calibration"]["source"]
    assert artifact.report["emitted"]["fused_attention"] == 6
    statuses = {r["name"]: r["status"] for r in artifact.report["verification"]}
    assert statuses["verify twin equals pruned model"] == "passed"
    assert statuses["NPU"] == "not run"
    assert json.loads((artifact.path / "manifest.json").read_text())["target"] == "ascend"


@pytest.fixture
def saved_bert(tmp_path):
    tiny_bert(layers=1, vocab=30).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_whole_folder_is_loaded(saved_bert):
    model = load_model(saved_bert)
    for name, tensor in tiny_bert(layers=1, vocab=30).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def without(held: dict, *names: str) -> dict:
    return {k: v for k, v in held.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: without(held, "pooler.dense.weight", "embeddings.LayerNorm.bias"),
            "weights are missing.*got embeddings.LayerNorm.bias, pooler.dense.weight; wanted|; save",
        ),
        (lambda held: {"x": torch.ones(2)}, "weights are missing.* and [0-9]+ more"),
        (
            lambda held: {**held, "pooler.dense.bias": torch.ones(3)},
            "another shape than the config says; got pooler.dense.bias",
        ),
    ],
)
def test_a_folder_whose_weights_are_not_the_models_is_refused(change, message, saved_bert):
    path = saved_bert / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(CaptureError, match=message):
        load_model(saved_bert)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"junk"),
        ("model.safetensors", b""),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "toes"}'),
        ("config.json", b'{"model_type": "bert", "architectures": ["BertConfig"]}'),
        ("config.json", b'{"model_type": "bert", "architectures": [3]}'),
        ("config.json", b'{"model_type": "bert", "architectures": ["Toes"]}'),
        ("config.json", b'{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": "wide"}'),
    ],
)
def test_a_folder_that_transformers_cannot_read_is_one_error(name, content, saved_bert):
    (saved_bert / name).write_bytes(content)
    with pytest.raises(CaptureError) as caught:
        load_model(saved_bert)
    assert "\n" not in str(caught.value)


def test_weights_that_share_storage_are_written_each(tmp_path):
    model = randomise(TinyMlp(width=16, neurons=16, out=16))
    model.down.weight.data = model.up.weight.data
    artifact = compile_pruned(model, "edge", torch.randn(4, 16), config=None, output=tmp_path / "a", measure=False)
    held = load_file(artifact.path / "model.safetensors")
    assert torch.equal(held["up.weight"], model.up.weight) and torch.equal(held["down.weight"], model.up.weight)


def test_an_output_path_that_cannot_be_made_is_refused_before_capture(tmp_path):
    def no_capture(title: str) -> None:
        pytest.fail(f"{title} began")

    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot be made"):
        mlp(tmp_path / "file" / "a", progress=Progress(no_capture))


class Banned(nn.Module):
    """Attention over ids other than 1, and one logit that is banned with the lowest float."""

    def __init__(self):
        super().__init__()
        self.tokens, self.qkv, self.head = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 9)
        self.register_buffer("ban", torch.arange(9) == 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        keep = (input_ids != 1)[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).reshape(b, s, 32)
        return self.head(mixed + x).masked_fill(self.ban, torch.finfo(torch.float32).min)


def test_ids_that_are_padding_are_masked_and_a_banned_logit_hides_no_error(tmp_path):
    model = randomise(Banned())
    ids = torch.randint(2, 50, (3, 9))
    ids[:, 0], ids[0, 6:] = 0, 1
    artifact = compile_pruned(model, "edge", {"input_ids": ids}, config=None, output=tmp_path / "a", measure=False)
    assert artifact.report["emitted"]["fused_attention"] == 1
    got = torch.from_numpy(load(artifact.path).run({"input_ids": ids.numpy()})["output"])
    torch.testing.assert_close(got, model(ids).detach(), rtol=1e-4, atol=1e-4)
