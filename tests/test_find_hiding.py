"""Masks in which True hides, as torch's own layers take them: found, and then as good as masks of real tokens."""

import numpy as np
import pytest
import torch
from torch import nn

from checks import randomise
from tilecut import PruneConfig, compile_pruned, load
from tilecut.batch_rows import batch_rows
from tilecut.make_cases import make_inputs
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_runtime.errors import LoweringError
from tilecut_targets.export_program import example_inputs

LENGTH = 12


def encoder(layers=2):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), layers, enable_nested_tensor=False
    )


class Tagger(nn.Module):
    """Ids and a mask of padding to a label for every token."""

    def __init__(self):
        super().__init__()
        self.table, self.encoder, self.out = nn.Embedding(50, 32), encoder(), nn.Linear(32, 5)

    def forward(self, input_ids, padding):
        return self.out(self.encoder(self.table(input_ids), src_key_padding_mask=padding))


class Kept(nn.Module):
    """The same, with a mask of what is real."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask == 0)


class Pooled(nn.Module):
    """Hand-written attention and a mean over what is real; `hides` says what the mask means."""

    def __init__(self, hides):
        super().__init__()
        self.hides, self.table, self.qkv, self.out = hides, nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 3)

    def forward(self, input_ids, mask):
        real = mask == 0 if self.hides else mask != 0
        q, k, v = self.qkv(self.table(input_ids)).view(*input_ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~real[:, None, None], -1e9)
        x = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) * real[..., None]
        return self.out(x.sum(1) / real.sum(1, keepdim=True))


class Causal(nn.Module):
    """Masks of both kinds: [S, S] and [B, S]."""

    def __init__(self):
        super().__init__()
        self.table, self.encoder = nn.Embedding(50, 32), encoder()

    def forward(self, input_ids, mask, padding):
        return self.encoder(self.table(input_ids), mask=mask, src_key_padding_mask=padding)


class Transformer(nn.Module):
    """torch's whole transformer behind a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)


class Pair(Transformer):
    """What is read and what is written are hidden apart."""

    def forward(self, src, tgt, src_padding, tgt_padding):
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.model(
            self.table(src), self.table(tgt), tgt_mask=causal, src_key_padding_mask=src_padding,
            tgt_key_padding_mask=tgt_padding, memory_key_padding_mask=src_padding,
        )  # fmt: skip


class Features(nn.Module):
    """Features instead of ids."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder()

    def forward(self, features, mask):
        return self.encoder(features, src_key_padding_mask=mask).masked_fill(mask[..., None], 0.0).sum(1)


class SequenceFirst(nn.Module):
    """Positions first, as torch's layers take them by default."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64)

    def forward(self, features, padding):
        return self.layer(features, src_key_padding_mask=padding)


class ThreeMasks(Transformer):
    """Every mask of torch's transformer given apart."""

    def forward(self, src, tgt, src_padding, tgt_padding, memory_padding):
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.model(
            self.table(src), self.table(tgt), tgt_mask=causal, src_key_padding_mask=src_padding,
            tgt_key_padding_mask=tgt_padding, memory_key_padding_mask=memory_padding,
        )  # fmt: skip


class MemoryAlone(Transformer):
    """What the decoder does not see, the encoder has mixed in: nothing tells that this hides."""

    def forward(self, src, tgt, memory_padding):
        return self.model(self.table(src), self.table(tgt), memory_key_padding_mask=memory_padding)


class ManyOutputs(Tagger):
    """Outputs whose positions stand elsewhere, or that have none."""

    def forward(self, input_ids, padding):
        out = super().forward(input_ids, padding)
        return out, out.transpose(1, 2), self.table(input_ids).mean((1, 2))


class Replaced(nn.Module):
    """A mask of words that another stands for."""

    def __init__(self):
        super().__init__()
        self.table, self.word, self.encoder = nn.Embedding(50, 32), nn.Parameter(torch.ones(32)), encoder()
        self.places = nn.Parameter(torch.zeros(LENGTH, 32))

    def forward(self, input_ids, replaced):
        x = torch.where(replaced[..., None], self.word, self.table(input_ids))
        return self.encoder(x + self.places[: input_ids.shape[1]])


class Tabular(nn.Module):
    """Features of which some are missing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * LENGTH, 64), nn.ReLU(), nn.Linear(64, LENGTH), nn.ReLU(), nn.Linear(LENGTH, LENGTH)
        )

    def forward(self, x, missing):
        return self.layers(torch.cat([x.masked_fill(missing, 0.0), missing.float()], 1))


def ids(seed=0):
    return torch.randint(0, 50, (3, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding(*lengths):
    return torch.arange(LENGTH)[None] >= torch.tensor(lengths or (7, 3, LENGTH))[:, None]


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
MODELS = {
    "tagger": (Tagger, lambda: (ids(), padding()), ("padding",)),
    "pooled, hides": (lambda: Pooled(True), lambda: (ids(), padding()), ("mask",)),
    "pooled, hides in integers": (lambda: Pooled(True), lambda: (ids(), padding().long()), ("mask",)),
    "pooled, keeps": (lambda: Pooled(False), lambda: (ids(), ~padding()), ()),
    "pooled, keeps in integers": (lambda: Pooled(False), lambda: (ids(), (~padding()).long()), ()),
    "causal and padding": (Causal, lambda: (ids(), CAUSAL, padding()), ("mask", "padding")),
    "pair": (Pair, lambda: (ids(), ids(1), padding(), padding(5, 9, 2)), ("src_padding", "tgt_padding")),
    "three masks": (
        ThreeMasks,
        lambda: (ids(), ids(1), padding(), padding(5, 9, 2), padding()),
        ("src_padding", "tgt_padding", "memory_padding"),
    ),
    "memory alone": (MemoryAlone, lambda: (ids(), ids(1), padding()), ()),
    "positions first": (SequenceFirst, lambda: (torch.randn(LENGTH, 3, 32), padding()), ("padding",)),
    "many outputs": (ManyOutputs, lambda: (ids(), padding()), ("padding",)),
    "replaced": (Replaced, lambda: (ids(), padding()), ()),
    "tabular": (Tabular, lambda: (torch.randn(3, LENGTH), padding()), ()),
    "features": (Features, lambda: (torch.randn(3, LENGTH, 32), padding()), ("mask",)),
}


def case(name):
    make, example, hiding = MODELS[name]
    return randomise(make().eval(), 0), example(), hiding


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_is_told_by_what_it_hides(name):
    model, example, hiding = case(name)
    graph = capture(model, example)
    assert graph.hiding == hiding
    assert graph.copy().hiding == hiding


@pytest.mark.parametrize("name", MODELS)
def test_inputs_that_are_made_up_show_every_row_something(name):
    model, example, _ = case(name)
    graph = capture(model, example)
    for made in (
        make_inputs(graph, 3, LENGTH, seed=1),
        make_inputs(graph, 3, LENGTH, 1, ragged=False),
        example_inputs(graph),
    ):
        for name, mask in made.items():
            if mask.dtype == torch.bool and name not in graph.unclear:
                real = ~mask if name in graph.hiding else mask
                assert real.any(1).all()
        assert all(x.isfinite().all() for x in graph.run(made).values())


@pytest.mark.parametrize(
    "name",
    [
        "tagger",
        "pooled, hides",
        "three masks",
        "memory alone",
        "positions first",
        "replaced",
        "tabular",
        "many outputs",
    ],
)
def test_it_goes_through_and_is_right(name, tmp_path):
    model, example, _ = case(name)
    given = dict(zip(capture(model, example).inputs, example, strict=True))
    config = PruneConfig(sparsity=0.3, cache="")
    artifact = compile_pruned(
        model, example_inputs=example, calibration=[given] * 3, config=config, output=tmp_path / "a", measure=False
    )
    assert artifact.report["macs"]["prunable_pruned"] < artifact.report["macs"]["prunable_dense"]
    found = next(iter(load(artifact.path).run({name: value.numpy() for name, value in given.items()}).values()))
    with torch.no_grad():
        wanted = artifact.module()(*example)
    wanted = (
        wanted
        if isinstance(wanted, torch.Tensor)
        else next(iter(wanted.values() if isinstance(wanted, dict) else wanted))
    )
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)


def test_padding_counts_as_little_as_under_a_mask_of_real_tokens(tmp_path):
    model = randomise(Tagger().eval(), 0)
    batches = [(ids(seed), padding(7, 3, 9 - seed)) for seed in range(4)]
    config = PruneConfig(sparsity=0.4, cache="")
    plans, outputs = [], []
    for one, mask, turned in ((model, "padding", False), (Kept(model), "attention_mask", True)):
        given = [{"input_ids": a, mask: (~b).long() if turned else b} for a, b in batches]
        artifact = compile_pruned(
            one, example_inputs=given[0], calibration=given, config=config, output=tmp_path / mask, measure=False
        )
        plans.append([g["kept"] for g in artifact.report["groups"]])
        held = {name: value.numpy() for name, value in given[0].items()}
        outputs.append(next(iter(load(artifact.path).run(held).values()))[~batches[0][1].numpy()])
    assert plans[0] == plans[1]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_a_batch_s_mask_says_what_is_real():
    graph = capture(Causal().eval(), (ids(), CAUSAL, padding()))
    (batch,) = check_batches(graph, [{"input_ids": ids(), "mask": CAUSAL, "padding": padding()}])
    assert batch.mask is not None
    assert torch.equal(batch.mask, ~padding())
    assert batch.positions == 7 + 3 + LENGTH
    assert Batch({"input_ids": ids(), "mask": CAUSAL}).mask is None


def test_attention_mask_is_taken_at_its_word():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Tagger()

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask)

    assert capture(Odd().eval(), (ids(), padding())).hiding == ()


def test_what_cannot_be_tried_is_noted():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.table = Tagger(), nn.Embedding(LENGTH, 5)

        def forward(self, input_ids, padding, places):
            return self.model(input_ids, padding) + self.table.weight[places + LENGTH]

    graph = capture(Picky().eval(), (ids(), padding(), torch.full((3, LENGTH), -1)))
    assert graph.hiding == ()
    assert graph.unclear == ("padding",)
    assert any(
        "whether padding keeps or hides what it marks is not known (it cannot be tried: " in note
        for note in graph.notes
    )


def test_a_decoder_with_such_a_mask_gets_no_cache(tmp_path):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.encoder, self.out = nn.Embedding(50, 32), encoder(1), nn.Linear(32, 50)

        def forward(self, input_ids, padding):
            causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
            return self.out(self.encoder(self.table(input_ids), mask=causal, src_key_padding_mask=padding))

    with pytest.raises(LoweringError, match="in the mask padding what is not 0 hides a token"):
        compile_pruned(
            Decoder().eval(), example_inputs=(ids(), padding()), output=tmp_path / "a", generate=True, measure=False,
            config=PruneConfig(sparsity=0.0),
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_rows_of_tokens_get_such_a_mask_and_are_padded_with_what_hides():
    graph = capture(Tagger().eval(), (ids(), padding()))
    rows = [{"input_ids": list(range(5))}, {"input_ids": list(range(8))}]
    (batch,) = batch_rows(graph, rows)
    assert batch.inputs["padding"].tolist() == [[False] * 5 + [True] * 3, [False] * 8]
    assert batch.positions == 13
    given = [{**row, "padding": [True] + [False] * (len(row["input_ids"]) - 1)} for row in rows]
    (batch,) = batch_rows(graph, given)
    assert batch.inputs["padding"].tolist() == [[True] + [False] * 4 + [True] * 3, [True] + [False] * 7]
