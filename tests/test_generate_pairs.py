"""Generation from encoder-decoders: greedy texts as torch's, what an encoder may be given, quantized, pruned, refusals."""

from typing import Any

import numpy as np
import pytest
import torch

from generation_models import PAIRS, VOCAB, greedy, pair
from tilecut import Artifact, PruneConfig, compile_pruned, load
from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.reference import verify_on_device
from tilecut_runtime.session import Session

LENGTHS = (12, 5, 9, 1)
READ = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
SOUND = torch.randn(4, 16, 80, generator=torch.Generator().manual_seed(0))
# Decoders begin with the model's own id, and with more.
BEGUN = [[3], [3, 8, 9], [3, 20], [3, 5, 6, 7]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> session and model; compiled when asked for."""
    held: dict[str, tuple[Session, torch.nn.Module]] = {}

    def get(name: str) -> tuple[Session, torch.nn.Module]:
        if name not in held:
            model = pair(name)
            folder = tmp_path_factory.mktemp("pairs") / name.replace(" ", "-")
            compile_pruned(model, "edge", config=None, output=folder, generate=True, max_length=90, measure=False)
            held[name] = load(folder, threads=1), model
        return held[name]

    return get


def given(session: Session) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """What the four rows of a batch read, for a session, and row by row for torch."""
    if "input_features" in {spec.name for spec in session.encoder.inputs}:
        return SOUND.numpy(), [{"input_features": SOUND[i : i + 1]} for i in range(4)]
    return READ, [{"input_ids": torch.tensor([row])} for row in READ]


def wanted(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]], begun: list[list[int]], steps: int) -> list[list[int]]:
    return [
        greedy(lambda ids, row=row: model(**row, decoder_input_ids=ids).logits, [first], steps)[0]
        for row, first in zip(rows, begun)
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_greedy_texts_are_torchs(made, name):
    session, model = made(name)
    read, rows = given(session)
    want = wanted(model, rows, BEGUN, 64)
    # Texts that say something, and that what was read decides.
    assert sum(len(set(row)) > 4 for row in want) >= 3 and len(set(map(tuple, want))) == 4
    got = session.generate(read, max_new_tokens=64, decoder_input_ids=BEGUN, eos=())
    assert got.tokens == want and got.reasons == ["length"] * 4 and got.texts is None
    # Alone as in the batch, and begun as the model begins.
    one = read[1] if isinstance(read, list) else read[1:2]
    assert session.generate(one, max_new_tokens=64, decoder_input_ids=BEGUN[1], eos=()).tokens == want[1:2]
    assert session.generate(read, max_new_tokens=9, eos=()).tokens == wanted(model, rows, [[3]] * 4, 9)


def test_what_an_encoder_may_be_given(made):
    session, _ = made("t5")
    want = session.generate(READ, max_new_tokens=12).tokens
    ids, mask = np.full((4, 12), 7), np.zeros((4, 12), np.int64)
    for row, tokens in enumerate(READ):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    assert session.generate(ids, mask, max_new_tokens=12).tokens == want
    named = {"input_ids": ids, "attention_mask": mask}
    assert session.generate(named, max_new_tokens=12).tokens == want
    assert [t for s in session.stream(named, max_new_tokens=12) if (t := s.tokens[2]) is not None] == want[2]
    # Padding on the left stands at other places for an encoder that tells positions: it is put on the right.
    left, kept = np.full((4, 12), 7), np.zeros((4, 12), np.int64)
    for row, tokens in enumerate(READ):
        left[row, 12 - len(tokens) :], kept[row, 12 - len(tokens) :] = tokens, 1
    assert session.generate(left, kept, max_new_tokens=12).tokens == want
    # Lists by name, as a tokenizer gives them, and ends as an array.
    listed = {"input_ids": [READ[1]], "attention_mask": [[1] * 5]}
    assert session.generate(listed, max_new_tokens=12, eos=np.array(2)).tokens == want[1:2]
    # A mask that is not given says that all is real.
    assert session.generate({"input_ids": np.array([READ[0]])}, max_new_tokens=12).tokens == want[:1]


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_quantized(how, tmp_path):
    model = pair("mbart")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # 64 random channels are no match for 4 bits.
            parameter *= 0.3 if parameter.ndim > 1 and "layers" in name else 1
    artifact = compile_pruned(
        model, "edge", config=PruneConfig(quantize=how, sparsity=0.0), output=tmp_path / how, generate=True, measure=False
    )
    names = {r.name: r.status for r in artifact.manifest.verification}
    assert names["encoder: quantized model: relative error"] == names["quantized model: relative error"] == "passed"
    assert artifact.report["quantization"]["encoder"]["how"] == how
    session = load(artifact.path)
    assert [len(row) for row in session.generate(READ, max_new_tokens=20, eos=()).tokens] == [20] * 4


@pytest.mark.filterwarnings("ignore:few calibration data")
def test_pruned(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, VOCAB, (2, n), generator=generator)
    batches = [
        {"input_ids": (x := ids(12)), "attention_mask": torch.ones_like(x), "decoder_input_ids": ids(10)} for _ in range(4)
    ]
    config = PruneConfig(sparsity=0.4, at={"sequence": 16}, cache="")
    artifact = compile_pruned(pair("t5"), "edge", None, batches, config, tmp_path / "out", generate=True, measure=False)
    module = artifact.module()
    source = lambda row: {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
    want = wanted(module, [source(row) for row in READ], [[3]] * 4, 40)
    assert load(artifact.path).generate(READ, max_new_tokens=40, eos=()).tokens == want
    assert all(r.status == "passed" for r in [*Artifact(artifact.path).verify(), *verify_on_device(artifact.path)])
    assert artifact.report["macs"]["pruned"] < artifact.report["macs"]["dense"]


def test_the_encoders_files_are_checked(made, tmp_path):
    session, _ = made("whisper")
    names = [r.name for r in verify_on_device(session.path)]
    assert names == ["hashes", "artifact equals reference", "encoder: artifact equals reference"]
    manifest = Manifest.read(session.path)
    assert manifest.entry["encoder"] == "encoder.onnx" and manifest.generation.start == (3,)
    assert [spec.name for spec in manifest.encoder.inputs] == ["input_features"]
    path = session.path / "encoder.onnx"
    held = path.read_bytes()
    try:
        path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="file was altered"):
            load(session.path)
    finally:
        path.write_bytes(held)


BAD = {
    "a negative id": (lambda: ([[4, -1]], {}), "input_ids holds an unknown token id; got -1; wanted 0 and above"),
    "ragged lists by name": (lambda: ({"input_ids": [[4, 5], [6]]}, {}), "input_ids is no array .* rows of one length; pad them"),
    "floats by name": (lambda: ({"input_ids": [[4.5, 5.0]]}, {}), "wrong dtype; got float64; wanted int64"),
    "bytes": (lambda: ([[4]], {"stop": b"xx"}), "stop does not fit; got b'xx'"),
    "a dtype that numpy lacks": (lambda: (torch.ones(1, 3, dtype=torch.bfloat16), {}), "input_ids are no array"),
    "an empty text": (lambda: ([[4, 5], []], {}), "input_ids holds an empty text"),
    "other rows": (
        lambda: (READ, {"decoder_input_ids": [[3], [3]]}),
        "decoder_input_ids has other rows than the input; got 2; wanted 4, or one for all",
    ),
    "floats": (lambda: (READ, {"decoder_input_ids": np.ones((4, 1))}), "decoder_input_ids are no token ids; got float64"),
    "an empty start": (lambda: (READ, {"decoder_input_ids": [[3], [], [3], [3]]}), "row 1 is an empty prompt"),
    "too long": (lambda: (READ, {"decoder_input_ids": [[3] * 91]}), "longer than the model's positions; got 91"),
    "a name": (lambda: ({"ids": np.ones((1, 3), np.int64)}, {}), "unknown input name; got ids"),
    "two masks": (
        lambda: ({"input_ids": np.ones((1, 3), np.int64)}, {"attention_mask": np.ones((1, 3))}),
        "inputs by name hold their own mask",
    ),
    "an unknown id": (lambda: ([[VOCAB]], {}), f"no embedding for; got {VOCAB} to {VOCAB}"),
    "a text": (lambda: ("hello", {}), "the prompts are texts, but the artifact holds no tokenizer.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error(made, what):
    build, why = BAD[what]
    read, options = build()
    with pytest.raises(InputError, match=why):
        made("t5")[0].generate(read, **options)


def test_what_other_models_do_not_take(made, tmp_path):
    with pytest.raises(InputError, match=r"wrong size of dimension 2; got 79; wanted 80"):
        made("whisper")[0].generate(SOUND[:, :, :79].numpy())
    with pytest.raises(InputError, match="the encoder has no mask; got attention_mask"):
        made("whisper")[0].generate(SOUND.numpy(), np.ones((4, 80), np.int64))
    with pytest.raises(ArtifactError, match="encoder"):
        Artifact(made("t5")[0].path).write_genai(tmp_path / "genai")


def test_the_command_line_generates_from_what_an_encoder_reads(made, tmp_path, command):
    session, _ = made("whisper")
    want = session.generate(SOUND[:1].numpy(), max_new_tokens=6, decoder_input_ids=[[3, 8]]).tokens[0]
    np.savez(tmp_path / "sound.npz", input_features=SOUND[:1].numpy())
    arguments = ("run", session.path, "--decoder-input-ids", "3,8", "--max-new-tokens", 6)
    code, printed, _ = command(*arguments, "--inputs", tmp_path / "sound.npz")
    assert code == 0 and [int(one) for one in printed.split()] == want
    np.savez(tmp_path / "two.npz", input_features=SOUND[:2].numpy())
    for more, why in (
        ((), "to generate, give either --prompt or --inputs"),
        (("--inputs", tmp_path / "sound.npz", "--prompt", "a"), "to generate, give either --prompt or --inputs"),
        (("--inputs", tmp_path / "two.npz"), r"input_features is not one row, which is printed as it comes"),
        (("--inputs", tmp_path / "none.npz"), "cannot be read as .npz"),
    ):
        code, printed, said = command(*arguments, *more)
        assert code == 1 and printed == "" and why in " ".join(said.split())
    code, _, said = command("run", session.path, "--decoder-input-ids", "3,x", "--inputs", tmp_path / "sound.npz")
    assert code == 1 and "not a comma-separated list of ids" in said
