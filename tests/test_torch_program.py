"""Programs without weights and without pickle: what is in the archive, and what comes back from it."""

import json
import zipfile
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from checks import ROOT, randomise
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, list_files
from tilecut_runtime.torch_program import WEIGHTS, open_program, read_program, save_program, tensors_of
from tilecut_targets.export_program import export_program


class Model(nn.Module):
    """Parameters, a buffer, a buffer outside the state_dict, attention, and positions made in the graph."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.places = nn.Embedding(64, 8)
        self.register_buffer("shift", torch.ones(8))
        self.register_buffer("table", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        x = x * self.shift + self.table + self.places(torch.arange(s, device=x.device))
        q, k, v = self.qkv(x).view(b, s, 3, 2, 4).permute(2, 0, 3, 1, 4)
        keep = mask[:, None, None, :] != 0
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).reshape(b, s, 8))


def inputs(b=2, s=7):
    mask = torch.ones(b, s, dtype=torch.long)
    mask[0, s // 2 + 1 :] = 0
    return {"x": torch.randn(b, s, 8), "mask": mask}


@pytest.fixture(scope="module")
def graph() -> Graph:
    made = capture(randomise(Model()), inputs())
    run_passes(made, [FuseAttention()])
    return made


@pytest.fixture(scope="module")
def program(graph):
    return export_program(graph)


@pytest.fixture
def saved(program, tmp_path):
    save_program(program, tmp_path / "model.pt2")
    save_file({k: v.contiguous() for k, v in tensors_of(program).items()}, tmp_path / WEIGHTS)
    return tmp_path


def pickles(path):
    """The entries of an archive that begin like a pickle, or like an archive that torch.save wrote."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if archive.read(name).startswith((b"\x80", b"PK")) or name.endswith((".pkl", ".pickle")):
                found.append(name)
    return found


def test_no_pickle_is_in_the_archive(program, saved):
    assert pickles(saved / "model.pt2") == []
    torch.export.save(program, saved / "plain.pt2")
    assert pickles(saved / "plain.pt2"), "torch no longer pickles: the test above shows nothing"


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_no_weight_is_in_the_archive(program, saved):
    everything = b"".join(contents(saved / "model.pt2").values())
    for name, tensor in tensors_of(program).items():
        assert tensor.numpy().tobytes()[:16] not in everything, name


def test_no_path_of_this_machine_is_in_the_archive(saved):
    everything = b"".join(contents(saved / "model.pt2").values())
    for trace in (b'File \\"', b'File "', b".py", str(ROOT).encode(), b"site-packages"):
        assert trace not in everything, trace


def test_saving_leaves_the_program_as_it_was(graph, program, saved):
    assert program.example_inputs is not None
    assert all(not v.is_meta for v in [*program.state_dict.values(), *program.constants.values()])
    x = inputs()
    assert torch.allclose(program.module()(**x)["output"], graph.run(x)["output"], atol=1e-6)


def test_every_tensor_is_named_as_in_the_graph(graph, program):
    assert set(tensors_of(program)) == set(graph.tensors)


def test_what_comes_back_is_the_graph_at_other_sizes(graph, saved):
    module = read_program(saved / "model.pt2", saved / WEIGHTS).module()
    for sizes in ((1, 1), (5, 33)):
        x = inputs(*sizes)
        torch.testing.assert_close(module(**x)["output"], graph.run(x)["output"], rtol=1e-5, atol=1e-5)


def test_what_is_read_back_is_the_same_program_on_the_same_tensors(program, saved):
    read = read_program(saved / "model.pt2", saved / WEIGHTS)
    assert [str(n.target) for n in read.graph.nodes] == [str(n.target) for n in program.graph.nodes]
    assert "tilecut.attention.default" in [str(n.target) for n in read.graph.nodes]
    for name, value in program.state_dict.items():
        got = read.state_dict[name]
        assert (type(got), got.requires_grad) == (type(value), value.requires_grad)
        assert torch.equal(got, value)


def test_what_is_read_back_can_be_trained(saved):
    module = read_program(saved / "model.pt2", saved / WEIGHTS).module()
    module(**inputs())["output"].square().sum().backward()
    assert {name for name, _ in module.named_parameters()} >= {"qkv.weight", "out.bias", "places.weight"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_weights_that_the_graph_does_not_read_are_ignored(program, saved):
    save_file({**load_file(saved / WEIGHTS), "extra": torch.zeros(3)}, saved / WEIGHTS)
    assert set(tensors_of(read_program(saved / "model.pt2", saved / WEIGHTS))) == set(tensors_of(program))


def test_tensors_outside_the_state_dict_travel_with_the_weights(tmp_path):
    model, x = randomise(Model()), inputs()
    program = torch.export.export(model, (), x)
    assert "table" not in model.state_dict() and "table" in tensors_of(program)
    save_program(program, tmp_path / "model.pt2")
    save_file({k: v.contiguous() for k, v in tensors_of(program).items()}, tmp_path / WEIGHTS)
    assert pickles(tmp_path / "model.pt2") == []
    module = read_program(tmp_path / "model.pt2", tmp_path / WEIGHTS).module()
    torch.testing.assert_close(module(**x), model(**x), rtol=1e-5, atol=1e-5)


def test_a_program_without_its_weights_raises(saved):
    module = torch.export.load(saved / "model.pt2").module()
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        module(**inputs())["output"].sum().item()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda held: held.pop("out.weight"), "tensor out.weight is missing"),
        (
            lambda held: held.update({"out.weight": torch.ones(8, 9)}),
            r"out.weight does not fit.*\[8, 9\]; wanted .*\[8, 8\]",
        ),
        (lambda held: held.update({"out.bias": torch.ones(8).double()}), "out.bias does not fit.*float64"),
        (lambda held: held.pop("table"), "tensor table is missing"),
    ],
)
def test_weights_that_do_not_fit(damage, message, saved):
    held = load_file(saved / WEIGHTS)
    damage(held)
    save_file(held, saved / WEIGHTS)
    with pytest.raises(ArtifactError, match=message):
        read_program(saved / "model.pt2", saved / WEIGHTS)


@pytest.mark.parametrize("name", ["model.pt2", WEIGHTS])
def test_opening_checks_the_hashes_first(name, saved):
    manifest = Manifest("cuda", "torch", "Model", {"model": "model.pt2"}, (), (), files=list_files(saved))
    with torch.no_grad():
        assert open_program(saved, manifest, "model")(**inputs())["output"].shape == (2, 7, 8)
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        open_program(saved, manifest, "model")


def test_a_program_that_the_manifest_does_not_name_is_refused(saved):
    manifest = Manifest("cuda", "torch", "Model", {"model": "model.pt2"}, (), (), files=list_files(saved))
    with pytest.raises(ArtifactError, match="names no file as its 'verify' entry"):
        open_program(saved, manifest, "verify")


def test_a_program_moves_whole_to_another_device(saved):
    # The meta device stands in for a GPU: it too refuses to mix with tensors on the CPU, such as positions made there.
    manifest = Manifest("cuda", "torch", "Model", {"model": "model.pt2"}, (), (), files=list_files(saved))
    module = open_program(saved, manifest, "model", "meta")
    out = module(**{k: v.to("meta") for k, v in inputs(3, 5).items()})["output"]
    assert out.is_meta and out.shape == (3, 5, 8)
    made_inside = [n.kwargs["device"] for n in cast(fx.GraphModule, module).graph.nodes if n.kwargs.get("device")]
    assert made_inside and {str(device) for device in made_inside} == {"meta"}


def forged(source, to, entry, content):
    """A copy of an archive with one entry added or replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            if not name.endswith(entry):
                new.writestr(name, old.read(name))
        new.writestr(f"{old.namelist()[0].split('/')[0]}/{entry}", content)
    return to


PICKLED = json.dumps({"config": {"w": {"path_name": "weight_0", "use_pickle": True}}})


@pytest.mark.parametrize(
    ("entry", "content", "message"),
    [
        ("data/weights/model_weights_config.json", PICKLED, "pickled data"),
        ("data/sample_inputs/model.pt", b"\x80\x02.", "data of its own"),
        ("data/weights/weight_0", b"numbers", "data of its own"),
        ("data/constants/tensor_0", b"numbers", "data of its own"),
        ("data/aotinductor/model/a.so", b"\x7fELF", "an unknown file"),
        ("data/weights/model_weights_config.json", "not json", "not a torch.export archive"),
        ("data/weights/model_weights_config.json", "[]", "not a torch.export archive"),
        ("data/weights/model_weights_config.json", '{"config": [1]}', "not a torch.export archive"),
    ],
)
def test_a_forged_archive_is_refused_before_torch_reads_it(entry, content, message, saved, monkeypatch):
    path = forged(saved / "model.pt2", saved / "forged.pt2", entry, content)
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("torch read it"))
    with pytest.raises(ArtifactError, match=message):
        read_program(path, saved / WEIGHTS)


def test_what_torch_writes_by_itself_is_refused(program, saved):
    torch.export.save(program, saved / "plain.pt2")
    with pytest.raises(ArtifactError, match="the archive holds"):
        read_program(saved / "plain.pt2", saved / WEIGHTS)


def test_a_file_that_is_no_archive(saved):
    (saved / "text.pt2").write_text("not a zip")
    with pytest.raises(ArtifactError, match="not a torch.export archive"):
        read_program(saved / "text.pt2", saved / WEIGHTS)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64])
def test_weights_that_are_no_safetensors(content, saved):
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: safetensors cannot read it"):
        read_program(saved / "model.pt2", saved / WEIGHTS)


def test_truncated_weights(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-7])
    with pytest.raises(ArtifactError, match="safetensors cannot read it"):
        read_program(saved / "model.pt2", saved / WEIGHTS)


def test_a_graph_that_torch_cannot_read(saved):
    path = forged(saved / "model.pt2", saved / "forged.pt2", "models/model.json", "{}")
    with pytest.raises(ArtifactError, match=r"forged\.pt2: torch cannot read it") as caught:
        read_program(path, saved / WEIGHTS)
    assert "\n" not in str(caught.value)
