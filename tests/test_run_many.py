"""Rows of different lengths, run together: each gets what it would get alone, in the caller's order."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from checks import emit, randomise
from tilecut import load
from tilecut_passes.capture import capture
from tilecut_runtime.errors import InputError
from tilecut_runtime.manifest import list_files
from tilecut_runtime.run_many import RUN_COST, buckets
from tilecut_targets.edge.portable import PortableTarget
from tilecut_targets.edge.target import EdgeTarget

LENGTHS = (5, 1, 19, 6, 5, 2, 18, 40, 7, 1, 30, 5)


def rows_of(session, lengths, seed=0, bare=False, vocab=50):
    """Random rows, some of them with padding of their own."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        shape = (length,) if bare else (1, length)
        row = {"input_ids": rng.integers(0, vocab, shape), "attention_mask": np.ones(shape, np.int64)}
        if i % 3 == 2:
            row["attention_mask"][..., length // 2 + 1 :] = 0
        if any(spec.name == "token_type_ids" for spec in session.inputs):
            row["token_type_ids"] = rng.integers(0, 2, shape)
        rows.append(row)
    return rows


def alone(session, row):
    """One row's outputs from a run of its own; without the first dimension where the row has none."""
    if next(iter(row.values())).ndim == len(session.inputs[0].shape):
        return session.run(row)
    return {k: v[0] for k, v in session.run({k: v[None] for k, v in row.items()}).items()}


def assert_as_alone(session, rows, **options):
    results = session.run_many(rows, **options)
    assert len(results) == len(rows)
    for row, got in zip(rows, results, strict=True):
        want = alone(session, row)
        assert list(got) == list(want)
        for name in want:
            assert got[name].shape == want[name].shape
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)
    return results


@pytest.fixture(scope="module")
def bert(edge_artifact):
    return load(edge_artifact.path, threads=1)


def saved(model, folder, target=None):
    """A session of a captured model, its config beside it."""
    made = emit(target or EdgeTarget(), capture(randomise(model)), folder)
    model.config.to_json_file(str(folder / "config.json"))
    made.manifest.files = list_files(folder)
    made.manifest.write(folder)
    return load(folder, threads=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return saved(transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier that looks for the last token that is not the padding token, 7."""
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=64, pad_token_id=7, num_labels=3
    )
    return saved(transformers.GPT2ForSequenceClassification(config), tmp_path_factory.mktemp("judge"), PortableTarget())


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("which", ["bert", "llama"])
@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
def test_every_row_gets_what_it_gets_alone(request, which, bare, max_tokens):
    session = request.getfixturevalue(which)
    assert_as_alone(session, rows_of(session, LENGTHS, bare=bare), max_tokens=max_tokens)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_mix_of_lengths(bert, seed):
    lengths = np.random.default_rng(seed).integers(1, 60, 1 + 9 * seed)
    assert_as_alone(bert, rows_of(bert, lengths, seed))


def test_outputs_with_and_without_a_sequence(bert):
    first, second = assert_as_alone(bert, rows_of(bert, (3, 9)))
    assert [first[name].shape[:2] for name in first] == [(1, 3), (1, 32 * 2)]
    assert second["last_hidden_state"].shape[:2] == (1, 9)


def test_results_hold_no_batch_in_memory(bert):
    assert all(v.base is None for out in bert.run_many(rows_of(bert, (3, 9, 4))) for v in out.values())


def test_ids_are_padded_with_the_models_own_padding_token(judge):
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(10, 50, (1, n)), "attention_mask": np.ones((1, n), np.int64)} for n in (3, 12, 5, 4)
    ]
    assert_as_alone(judge, rows)


def test_no_rows_give_no_results(bert):
    assert bert.run_many([]) == []
    assert bert.run_many(iter(rows_of(bert, (4,))))[0]["last_hidden_state"].shape[1] == 4


class Sums(nn.Module):
    """Gated numbers summed up along the sequence."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x * gate
        return {"sums": x.cumsum(1), "total": x.sum(1)}


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x * 2], 1).cumsum(1)


class Total(nn.Module):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (x * attention_mask[:, :, None]).sum()


def session_of(model, example, folder):
    return load(emit(EdgeTarget(), capture(model, example), folder).folder, threads=1)


def reals(lengths, *names):
    rng = np.random.default_rng(0)
    return [{name: rng.normal(size=(1, n, 3)).astype(np.float32) for name in names} for n in lengths]


def test_without_a_mask_rows_of_different_lengths_are_refused(tmp_path):
    session = session_of(Sums(), {"x": torch.randn(2, 5, 3), "gate": torch.randn(2, 5, 3)}, tmp_path)
    assert_as_alone(session, reals((4, 4, 4), "x", "gate"))
    message = (
        "rows differ in sequence, and the model has no attention_mask over it.*got 3 to 9; wanted one length; compile"
    )
    with pytest.raises(InputError, match=message):
        session.run_many(reals((4, 9, 3), "x", "gate"))
    assert_as_alone(session, reals((4, 9, 3), "x", "gate"), padding={"gate": 0})


def test_where_sizes_are_computed_only_one_length_shares_a_run(tmp_path):
    session = session_of(Doubled(), torch.randn(2, 5, 3), tmp_path)
    assert_as_alone(session, reals((4, 9, 4, 3, 9), "x"))


def test_where_outputs_have_no_rows_they_run_alone(tmp_path):
    example = {"x": torch.randn(2, 5, 3), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    session = session_of(Total(), example, tmp_path)
    assert_as_alone(
        session, [{**x, "attention_mask": np.ones(x["x"].shape[:2], np.int64)} for x in reals((2, 7, 2), "x")]
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "run_many: inputs must be a list of rows; got dict"),
        (3, {}, "inputs must be a list of rows; got int"),
        ([3], {}, r"run_many: inputs\[0\]: inputs must be a mapping"),
        ([], {"max_tokens": 0}, "max_tokens must be a positive integer; got 0"),
        ([], {"max_tokens": True}, "max_tokens must be a positive integer; got True"),
        ([], {"padding": {"mask": 0}}, "padding names an unknown input; got mask; wanted input_ids, attention_mask"),
    ],
)
def test_what_does_not_fit_is_named(bert, rows, options, message):
    with pytest.raises(InputError, match=message):
        bert.run_many(rows, **options)


def test_a_row_that_does_not_fit_is_named(bert):
    rows = rows_of(bert, (3, 4))
    with pytest.raises(InputError, match=r"run_many: inputs\[1\]: input token_type_ids: sequence .* differs"):
        bert.run_many([rows[0], {**rows[1], "token_type_ids": rows[0]["token_type_ids"]}])
    with pytest.raises(InputError, match=r"inputs\[1\]: missing input"):
        bert.run_many([rows[0], {}])
    with pytest.raises(InputError, match=r"inputs\[0\]: holds several rows; got 2; wanted one"):
        bert.run_many([{k: np.repeat(v, 2, 0) for k, v in rows[0].items()}])
    with pytest.raises(InputError, match=r"inputs\[0\]: input attention_mask: wrong rank"):
        bert.run_many([{**rows[0], "attention_mask": rows[0]["attention_mask"][0]}])


def cost(lengths, division):
    return sum(RUN_COST + len(rows) * max(lengths[i] for i in rows) for rows in division)


def divisions(rows):
    """Every division of sorted rows into runs of neighbours."""
    for cuts in itertools.product([False, True], repeat=max(len(rows) - 1, 0)):
        found = [[rows[0]]]
        for row, cut in zip(rows[1:], cuts):
            if cut:
                found.append([])
            found[-1].append(row)
        yield found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 200), st.integers(1, 8))
def test_no_division_costs_less(lengths, max_tokens, max_rows):
    legal = lambda rows: (
        len(rows) == 1 or (len(rows) <= max_rows and len(rows) * max(lengths[i] for i in rows) <= max_tokens)
    )
    found = buckets(np.array(lengths)[:, None], max_tokens, max_rows)
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert all(map(legal, found))
    every = divisions(sorted(range(len(lengths)), key=lengths.__getitem__))
    assert cost(lengths, found) == min(cost(lengths, one) for one in every if all(map(legal, one)))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_padding_is_bounded(lengths):
    found = buckets(np.array(lengths)[:, None], 1 << 20)
    wasted = sum(max(lengths[i] for i in rows) - lengths[i] for rows in found for i in rows)
    assert wasted <= RUN_COST * (len(set(lengths)) - 1)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=20), st.integers(1, 300))
def test_two_lengths_a_row_stay_within_the_limit(lengths, max_tokens):
    array = np.array(lengths)
    found = buckets(array, max_tokens)
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * array[rows].max(0).sum() <= max_tokens for rows in found)
