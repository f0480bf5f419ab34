"""Padded and packed batches: their fields, what they refuse, and that packed training is training one by one."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, GPT2Config, LlamaConfig

import tilecut
from checks import ROOT
from tilecut import TilecutError, pack, pad_to_longest
from tilecut.collate import IGNORED

tilecut.register_attention()

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
    {"input_ids": np.array([8]), "labels": np.array([8])},
    {"input_ids": torch.tensor([9, 10]), "labels": torch.tensor([9, 10])},
]


def test_padding_on_either_side():
    batch = pad_to_longest(EXAMPLES, pad_id=1)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1], [9, 10, 1]],
        "labels": [[5, 6, 7], [8, IGNORED, IGNORED], [9, 10, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
    }
    assert {x.dtype for x in batch.values()} == {torch.int64}
    left = pad_to_longest(EXAMPLES, pad_id=1, side="left", multiple_of=4)
    assert left["input_ids"].tolist() == [[1, 5, 6, 7], [1, 1, 1, 8], [1, 1, 9, 10]]
    assert left["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]


def test_other_fields_numbers_and_given_masks():
    examples = [
        {"input_ids": [5, 6], "token_type_ids": [1, 1], "attention_mask": [True, True], "labels": 1},
        {"input_ids": [7], "token_type_ids": [1], "attention_mask": [True], "labels": 0.5},
    ]
    padded = pad_to_longest(examples)
    assert padded["token_type_ids"].tolist() == [[1, 1], [1, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert padded["labels"].tolist() == [1.0, 0.5]
    packed = pack(examples, bounds=None)
    assert {name: x.tolist() for name, x in packed.items()} == {
        "input_ids": [[5, 6, 7]],
        "token_type_ids": [[1, 1, 1]],
        "labels": [1.0, 0.5],
        "position_ids": [[0, 1, 0]],
    }


def test_packed_as_tilecut_takes_it():
    batch = pack(EXAMPLES, bounds="tilecut")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_length"] == 3 and "attention_mask" not in batch
    assert pack(EXAMPLES, next_token=False)["labels"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert pack(EXAMPLES, first_position=2)["position_ids"].tolist() == [[2, 3, 4, 2, 2, 3]]
    assert EXAMPLES[0]["labels"] == [5, 6, 7] and EXAMPLES[2]["labels"].tolist() == [9, 10]


def test_packed_as_the_collator_of_transformers_packs():
    ours = pack(EXAMPLES)
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([dict(e) for e in EXAMPLES])
    assert ours.pop("use_cache") is False
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name
        assert type(ours[name]) is type(value)


@pytest.mark.parametrize(
    ("options", "bounds"), [({"total": 14}, [0, 3, 4, 6, 9, 12, 14]), ({"multiple_of": 4}, [0, 3, 4, 6, 8])]
)
def test_what_fills_a_row_up_is_sequences_of_its_own(options, bounds):
    batch = pack(EXAMPLES, pad_id=1, bounds="tilecut", **options)
    assert batch["cu_seqlens"].tolist() == bounds and batch["max_length"] == 3
    assert batch["input_ids"][0, 6:].tolist() == [1] * (bounds[-1] - 6)
    assert set(batch["labels"][0, 6:].tolist()) == {IGNORED}
    counted = [i for low, high in itertools.pairwise(bounds) for i in range(high - low)]
    assert batch["position_ids"].tolist() == [counted]


def test_given_positions_are_kept():
    batch = pack([{"input_ids": [5, 6], "position_ids": [7, 8]}, {"input_ids": [5], "position_ids": [4]}], total=5)
    assert batch["position_ids"].tolist() == [[7, 8, 4, 0, 1]]


def test_in_a_data_loader():
    loader = DataLoader(EXAMPLES, batch_size=2, collate_fn=partial(pack, bounds="tilecut"))  # pyright: ignore
    assert [batch["cu_seqlens"].tolist() for batch in loader] == [[0, 3, 4], [0, 2]]
    assert [x["input_ids"].shape for x in DataLoader(EXAMPLES, 3, collate_fn=pad_to_longest)] == [(3, 3)]


@pytest.mark.parametrize("collate", [pad_to_longest, pack])
@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "the batch has no examples"),
        ([[1, 2]], "example 0: not a mapping; got list"),
        ([{"input_ids": [1]}, {"labels": [1]}], "example 1: other fields than example 0; got ['labels']"),
        (
            [{"input_ids": [1], "labels": [1, 2]}],
            "example 0: its fields differ in length; got {'input_ids': 1, 'labels': 2}",
        ),
        ([{"labels": 1}], "example 0: its fields differ in length; got no field of tokens"),
        ([{"input_ids": []}], "example 0: it has no tokens"),
        ([{"input_ids": [[1]]}], "example 0: input_ids: too many dimensions; got [1, 1]"),
        ([{"input_ids": ["a"]}], "example 0: input_ids: no tensor can be made of it"),
        ([{"input_ids": [1], "x": 1}, {"input_ids": [1], "x": [1]}], "example 1: x: a number in one example"),
    ],
)
def test_what_is_refused(collate, examples, said):
    with pytest.raises(TilecutError) as e:
        collate(examples)
    assert said in str(e.value) and str(e.value).startswith(collate.__name__)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("collate", "options", "said"),
    [
        (pad_to_longest, {"multiple_of": 0}, "pad_to_longest: multiple_of is not a positive integer; got 0"),
        (pad_to_longest, {"side": "top"}, "no such side; got 'top'"),
        (pack, {"total": -1}, "pack: total is not a positive integer; got -1"),
        (pack, {"total": 5}, "pack: the examples have more tokens than total; got 6; wanted at most 5"),
        (pack, {"total": 7, "multiple_of": 2}, "total is no multiple of multiple_of"),
        (pack, {"bounds": "flash"}, "pack: no such bounds; got 'flash'"),
    ],
)
def test_options_that_are_refused(collate, options, said):
    with pytest.raises(TilecutError, match=said):
        collate(EXAMPLES, **options)


def test_padding_is_not_packed():
    with pytest.raises(TilecutError, match="pack: example 0: it holds padding"):
        pack([{"input_ids": [1, 0], "attention_mask": [1, 0]}])


CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
    ),
    "gpt2": GPT2Config(
        vocab_size=60,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    ),
}


def one_by_one(model, examples):
    """The loss of each example, weighted by its tokens that have a next one; and its gradients."""
    scored = sum(len(e["labels"]) - 1 for e in examples)
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        if len(example["labels"]) > 1:
            loss = model(**{k: v[None] for k, v in example.items()}).loss * (len(example["labels"]) - 1) / scored
            loss.backward()
            total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"bounds": None}, {"total": 40}], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "tilecut"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_step_is_the_steps_one_by_one(name, attention, options):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).double().train()
    ids = [torch.randint(0, 60, (n,)) for n in (7, 1, 12, 4)]
    examples = [{"input_ids": x, "labels": x.clone()} for x in ids]
    loss, gradients = one_by_one(copy.deepcopy(model), examples)
    batch = pack(examples, **options)
    got = model(**({"use_cache": False} | batch)).loss
    got.backward()
    # transformers takes the loss in float32.
    assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[key], rtol=1e-4, atol=1e-7), key


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not in a checkout")
def test_the_code_in_the_docs_runs(capsys):
    text = (ROOT / "docs" / "variable_length.md").read_text(encoding="utf-8")
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], {})
    assert "torch.Size([5, 32])" in capsys.readouterr().out


@pytest.mark.parametrize("collate", [pack, pad_to_longest])
@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"input_ids": [1.5, 2.0]}, {}, "input_ids: not integers; got torch.float32"),
        ({"input_ids": torch.tensor([1j])}, {}, "no batch can be made of it; got torch.complex64"),
        ({"input_ids": torch.ones(2, dtype=torch.long, device="meta")}, {}, "no batch can be made of it"),
        ({"input_ids": [1], 3: [2]}, {}, "a field whose name is no text; got 3"),
        ({"input_ids": [1]}, {"pad_id": "x"}, "pad_id is no integer of 64 bits; got 'x'"),
        ({"input_ids": [1]}, {"pad_id": 2**70}, "pad_id is no integer of 64 bits"),
        ({"input_ids": [1]}, {"multiple_of": True}, "multiple_of is not a positive integer"),
    ],
)
def test_odd_fields_and_options_are_one_error(collate, example, options, message):
    with pytest.raises(TilecutError, match=message):
        collate([example], **options)


def test_a_tensor_is_no_list_of_examples():
    with pytest.raises(TilecutError, match="not a list of examples; got Tensor"):
        pack(torch.ones(2, 3))


def test_labels_that_are_truths_are_numbers():
    made = pad_to_longest([{"input_ids": [1, 2], "labels": [True, False]}, {"input_ids": [1], "labels": [True]}])
    assert made["labels"].tolist() == [[1, 0], [1, -100]]


def test_values_that_want_a_gradient_are_taken_as_they_are():
    made = pad_to_longest([{"input_ids": [1], "weight": torch.ones(1, requires_grad=True)}])
    assert not made["weight"].requires_grad
