"""Text in and out of generation: pieces make the whole, stop strings, the command line."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from generation_models import SIZES, talkative
from tilecut import compile_pruned, load
from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.manifest import Manifest, list_files
from tilecut_runtime.stream_text import StreamText
from tiny_tokenizer import SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer().backend_tokenizer


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def written(prompt, text, stops=()):
    """The pieces, and whether a stop string ended them."""
    made = StreamText(TOKENIZER, ids_of(prompt), stops)
    pieces = []
    for token in ids_of(text):
        pieces.append(made.push(token))
        if made.ended:
            return pieces, True
    pieces.append(made.finish())
    return pieces, made.ended


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_pieces_make_the_whole(prompt, text):
    pieces, ended = written(prompt, text)
    assert "".join(pieces) == text and not ended
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    pieces, ended = written("x", text, stops)
    ends = [end for stop in stops for end in [text.find(stop)] if end >= 0]
    if not ends:
        assert "".join(pieces) == text and not ended
        return
    # The stop string that is whole first ends the text, whatever began before.
    first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
    assert ended and "".join(pieces) == text[: min(at for stop in stops if (at := text[:first].find(stop)) >= 0)]


def test_half_a_character_is_told_when_the_text_ends():
    made = StreamText(TOKENIZER, ids_of("a"), ())
    half = ids_of("\u00e9")[0]
    assert made.push(half) == "" and made.finish() == "\ufffd"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": SIZE, "num_key_value_heads": 2})
    talkative(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(model_folder):
    return compile_pruned(
        model_folder,
        "edge",
        config=None,
        output=model_folder.parent / "artifact",
        generate=True,
        measure=False,
        max_length=60,
    )


@pytest.fixture(scope="module")
def session(artifact):
    return load(artifact.path, threads=1)


def test_texts_in_texts_out(session):
    prompts = ["Once upon a time", "The"]
    got = session.generate(prompts, max_new_tokens=20, eos=())
    ids = [TOKENIZER.encode(prompt).ids for prompt in prompts]
    assert got.tokens == session.generate(ids, max_new_tokens=20, eos=()).tokens
    assert got.texts == [
        TOKENIZER.decode(ids_ + row)[len(TOKENIZER.decode(ids_)) :] for ids_, row in zip(ids, got.tokens)
    ]
    streamed = list(session.stream(prompts, max_new_tokens=20, eos=()))
    assert ["".join(step.texts[row] for step in streamed) for row in range(2)] == got.texts
    assert session.generate(prompts[0], max_new_tokens=20, eos=()).texts == got.texts[:1]


def test_a_stop_string_ends_a_row(session):
    whole = session.generate("Once", max_new_tokens=30, eos=())
    stop = whole.texts[0][5:7]
    got = session.generate("Once", max_new_tokens=30, eos=(), stop=stop)
    assert got.texts == [whole.texts[0][: whole.texts[0].find(stop)]] and got.reasons == ["stop"]
    assert len(got.tokens[0]) < 30
    ids = TOKENIZER.encode("Once").ids
    assert session.generate(ids, max_new_tokens=30, eos=(), stop=[stop, "\x00"]).tokens == got.tokens


def test_an_end_token_is_no_text(session):
    whole = session.generate("Once", max_new_tokens=8, eos=())
    end = whole.tokens[0][4]
    place = whole.tokens[0].index(end)
    got = session.generate("Once", max_new_tokens=8, eos=end)
    assert got.reasons == ["eos"] and got.tokens[0] == whole.tokens[0][: place + 1]
    ids = TOKENIZER.encode("Once").ids
    assert got.texts[0] == TOKENIZER.decode(ids + got.tokens[0][:-1])[len(TOKENIZER.decode(ids)) :]


def test_prompts_that_do_not_fit(session):
    with pytest.raises(InputError, match="row 0 is longer than the model's positions; got 82; wanted at most 60"):
        session.generate("x" * 80)
    with pytest.raises(InputError, match="texts need no attention_mask"):
        session.generate("x", [[1]])


def test_a_damaged_tokenizer_is_named(artifact, tmp_path):
    manifest = Manifest.read(artifact.path)
    for name in ("model.onnx",):
        (tmp_path / name).write_bytes((artifact.path / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    manifest.files = list_files(tmp_path)
    manifest.write(tmp_path)
    with pytest.raises(ArtifactError, match="tokenizers cannot read it"):
        load(tmp_path).generate("x")


def test_the_command_line_streams(session, artifact, command):
    want = session.generate("Once", max_new_tokens=12)
    code, printed, _ = command("run", artifact.path, "--prompt", "Once", "--max-new-tokens", 12)
    assert (code, printed) == (0, want.texts[0] + "\n")
    code, printed, _ = command("run", artifact.path, "--prompt", "Once", "--max-new-tokens", 12, "--json")
    assert json.loads(printed) == {"text": want.texts[0], "tokens": len(want.tokens[0]), "reason": want.reasons[0]}
    code, _, said = command("run", artifact.path, "--prompt", "Once", "--temperature", -1)
    assert code == 1 and "temperature does not fit" in said
    code, _, said = command("run", artifact.path, "--prompt", "Once", "--text", "a")
    assert code == 1 and "give either --prompt or --inputs, and none of" in " ".join(said.split())


def test_the_command_line_compiles(model_folder, tmp_path, command):
    out = tmp_path / "made"
    code, _, said = command(
        "compile", model_folder, "--dense", "--generate", "--max-length", 40, "--no-measure", "--output", out
    )
    assert code == 0, said
    assert Manifest.read(out).generation.max_length == 40
    code, _, said = command("compile", model_folder, "--dense", "--max-length", 40, "--no-measure", "--output", out)
    assert code == 1 and "give generate=True too" in said
