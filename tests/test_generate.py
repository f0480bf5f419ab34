"""Generation from artifacts: greedy texts token for token as torch's, padding, ends, text in and out, one error a bad input."""

import numpy as np
import pytest
import torch

from generation_models import CONFIGS, POSITIONS, VOCAB, decoder, greedy, uneven_llama
from tilecut import Artifact, compile_pruned, load
from tilecut_runtime.errors import InputError
from tilecut_runtime.session import Session

LENGTHS = (12, 5, 9, 1)
PROMPTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> session and model; compiled when asked for."""
    held: dict[str, tuple[Session, torch.nn.Module]] = {}

    def get(name: str) -> tuple[Session, torch.nn.Module]:
        if name not in held:
            model = decoder(name)
            folder = tmp_path_factory.mktemp("generate") / name
            artifact = compile_pruned(model, "edge", config=None, output=folder, generate=True, measure=False)
            held[name] = load(artifact.path, threads=1), model
        return held[name]

    return get


def padded(left: bool) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as one array, and its mask."""
    ids = np.full((len(PROMPTS), max(LENGTHS)), 7, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        place = slice(ids.shape[1] - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts_are_torchs(made, name):
    session, model = made(name)
    want = greedy(lambda ids: model(input_ids=ids).logits, PROMPTS, 64)
    # Texts that say something: several tokens each, all but one row of a tied model.
    assert sum(len(set(row)) > 4 for row in want) >= 3
    got = session.generate(PROMPTS, max_new_tokens=64, eos=())
    assert got.tokens == want and got.reasons == ["length"] * 4 and got.texts is None
    for left in (False, True):
        assert session.generate(*padded(left), max_new_tokens=64, eos=()).tokens == want


@pytest.mark.filterwarnings("ignore:few calibration data")
def test_a_pruned_model_whose_layers_have_different_heads(tmp_path):
    artifact = uneven_llama(tmp_path / "pruned")
    session, pruned = load(artifact.path, threads=1), artifact.module()
    heads = [spec.shape[1] for spec in session.inputs if spec.name.endswith(".key")]
    assert heads == [1, 2]
    run = lambda ids: pruned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert session.generate(PROMPTS, max_new_tokens=64, eos=()).tokens == greedy(run, PROMPTS, 64)
    assert {r.name for r in artifact.manifest.verification} >= {
        "steps equal the whole text",
        "artifact equals pruned model",
    }
    assert all(r.status == "passed" for r in Artifact(artifact.path).verify())


def test_rows_end_where_they_should(made):
    session, _ = made("llama")
    whole = session.generate(PROMPTS, max_new_tokens=30, eos=()).tokens
    end = whole[0][6]
    got = session.generate(PROMPTS, max_new_tokens=30, eos=end)
    stopped = session.generate(PROMPTS, max_new_tokens=30, eos=(), stop=[end, 10_000])
    assert stopped.tokens == got.tokens
    for row, tokens in enumerate(whole):
        ends = tokens.index(end) + 1 if end in tokens else 30
        assert got.tokens[row] == tokens[:ends]
        assert got.reasons[row] == ("eos" if ends < 30 or tokens[-1] == end else "length")
        assert stopped.reasons[row] == ("stop" if got.reasons[row] == "eos" else "length")
    assert 2 in session.manifest.generation.eos


def test_a_row_ends_where_the_model_has_no_position_left(made):
    session, model = made("gpt2")
    prompts = [PROMPTS[0] * 10, PROMPTS[1]]
    got = session.generate(prompts, max_new_tokens=200, eos=())
    assert [len(row) for row in got.tokens] == [POSITIONS - 120 + 1, POSITIONS - 5 + 1]
    assert got.reasons == ["length", "length"]
    assert got.tokens == [
        greedy(lambda ids: model(input_ids=ids).logits, [prompt], len(row))[0]
        for prompt, row in zip(prompts, got.tokens)
    ]


def test_a_stream_is_the_same_text_in_steps(made):
    session, _ = made("mistral")
    whole = session.generate(PROMPTS, max_new_tokens=12, stop=[3])
    steps = list(session.stream(PROMPTS, max_new_tokens=12, stop=[3]))
    for row, tokens in enumerate(whole.tokens):
        assert [step.tokens[row] for step in steps if step.tokens[row] is not None] == tokens
        assert [r for step in steps if (r := step.reasons[row])] == [whole.reasons[row]]
    # Nothing is computed that is not asked for.
    first = next(iter(session.stream(PROMPTS, max_new_tokens=10_000)))
    assert first.tokens == tuple(row[0] for row in whole.tokens)


def test_draws_are_repeatable_and_apart(made):
    session, _ = made("llama")
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "eos": ()}
    one, two = (session.generate(PROMPTS, seed=5, **options).tokens for _ in range(2))
    assert one == two != session.generate(PROMPTS, seed=6, **options).tokens
    # A row draws for itself.
    assert session.generate(PROMPTS[:2], seed=5, **options).tokens == one[:2]
    # Equal prompts are drawn differently.
    same = session.generate([PROMPTS[0]] * 3, seed=5, **options).tokens
    assert len(set(map(tuple, same))) > 1
    assert (
        session.generate(PROMPTS, seed=5, **{**options, "top_k": 1}).tokens
        == session.generate(PROMPTS, max_new_tokens=20, eos=()).tokens
    )


def test_a_penalty_as_transformers_has_it(made):
    session, model = made("llama")
    for prompt in PROMPTS:
        want = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False,
            repetition_penalty=1.7, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert (
            session.generate([prompt], max_new_tokens=24, repetition_penalty=1.7, eos=()).tokens[0]
            == want[0, len(prompt) :].tolist()
        )


def test_ids_come_in_many_forms(made):
    session, _ = made("llama")
    want = session.generate([PROMPTS[0]], max_new_tokens=3).tokens
    for given in (
        PROMPTS[0],
        np.array(PROMPTS[0], np.int32),
        torch.tensor([PROMPTS[0]]),
        [np.array(PROMPTS[0])],
        tuple(PROMPTS[0]),
    ):
        assert session.generate(given, max_new_tokens=3).tokens == want


IDS = [[5, 6, 7]]


@pytest.mark.parametrize(
    ("given", "options", "why"),
    [
        ([[1] * 200], {}, "row 0 is longer than the model's positions; got 200; wanted at most 128"),
        ([[]], {}, "row 0 is an empty prompt; wanted one token at least"),
        ([[4], []], {}, "row 1 is an empty prompt"),
        ([], {}, "is an empty prompt"),
        (np.ones((2, 3)), {}, r"input_ids are no token ids; got float64 \[2, 3\]"),
        ([[5, 97]], {}, "row 0 holds an unknown token id; got 97; wanted 0 to 96"),
        ([[5, -1]], {}, "row 0 holds an unknown token id; got -1"),
        (IDS, {"attention_mask": [[1, 0, 1]]}, "row 0 of attention_mask has padding between its tokens"),
        (IDS, {"attention_mask": [[0, 0, 0]]}, "row 0 is an empty prompt"),
        (IDS, {"attention_mask": [[1, 1]]}, "attention_mask does not fit input_ids"),
        (IDS, {"attention_mask": [[1, 2, 1]]}, "attention_mask says something else than real or not; got 2; wanted 0 and 1"),
        ([[5], [6, 7]], {"attention_mask": [[1], [1, 1]]}, "rows of unequal lengths in input_ids hold no padding"),
        ([[5, 4], [6, 7]], {"attention_mask": [[1], [1, 1]]}, "attention_mask is no array"),
        (IDS, {"decoder_input_ids": [3]}, "the model has no encoder; got decoder_input_ids"),
        (IDS, {"stop": "end"}, "stop holds the string 'end', but the artifact holds no tokenizer.json; give token ids"),
        ("a text", {}, "the prompts are texts, but the artifact holds no tokenizer.json"),
        (
            IDS,
            {"beams": 4},
            "unknown argument; got beams; wanted decoder_input_ids, temperature, top_k, top_p, repetition_penalty, stop, eos",
        ),
        (IDS, {"temperature": -1}, "temperature does not fit; got -1; wanted a number from 0 on"),
        (IDS, {"temperature": float("nan")}, "temperature does not fit; got nan"),
        (IDS, {"temperature": 1, "top_k": 0}, "top_k does not fit; got 0; wanted a positive integer or None"),
        (IDS, {"temperature": 1, "top_p": 1.5}, "top_p does not fit; got 1.5"),
        (IDS, {"top_p": 0.5}, "top_k and top_p choose among draws, and temperature 0 draws nothing"),
        (IDS, {"repetition_penalty": 0}, "repetition_penalty does not fit; got 0"),
        (IDS, {"seed": "a"}, "seed does not fit; got 'a'"),
        (IDS, {"max_new_tokens": 0}, "max_new_tokens does not fit; got 0; wanted a positive integer"),
        (IDS, {"stop": [1.5]}, "stop does not fit; got 1.5; wanted token ids and strings"),
        (IDS, {"stop": [""]}, "stop does not fit; got ''"),
        (IDS, {"eos": "x"}, "eos does not fit; got 'x'; wanted token ids"),
    ],
)
def test_bad_input_is_one_error(made, given, options, why):
    session, _ = made("llama")
    with pytest.raises(InputError, match=why) as caught:
        session.generate(given, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        session.stream(given, **options)


def step(session, **change):
    """One step's inputs, two rows of three tokens behind empty caches of eight places."""
    inputs = {"input_ids": np.ones((2, 3), np.int64), "past_lengths": np.zeros(2, np.int64), "lengths": np.full(2, 3)}
    for spec in session.inputs[3:]:
        inputs[spec.name] = np.zeros((2, spec.shape[1], 8, spec.shape[3]), np.float32)
    return {**inputs, **change}


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((2, 3, 8, 16), r"past_key_values.0.key: wrong size of dimension 1; got 3; wanted 2"),
        (
            (2, 2, 9, 16),
            r"past_key_values.0.value: capacity \(dimension 2\) differs from input past_key_values.0.key's; got 8; wanted 9",
        ),
        ((2, 2, 500, 16), r"past_key_values.0.key: capacity \(dimension 2\) is out of range; got 500; wanted 1 to 128"),
        ((2, 2, 16), r"past_key_values.0.key: wrong rank"),
    ],
)
def test_a_cache_of_the_wrong_shape_is_one_error(made, shape, why):
    session, _ = made("llama")
    session.run(step(session))
    with pytest.raises(InputError, match=why):
        session.run(step(session, **{"past_key_values.0.key": np.zeros(shape, np.float32)}))


def test_an_artifact_without_a_cache_says_so(edge_artifact):
    with pytest.raises(InputError, match="was compiled without a cache; compile it with generate=True"):
        load(edge_artifact.path).generate([[1, 2]])
