"""The remedies: each is reached by a model that needs it, and named in the graph's notes."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from checks import randomise
from tilecut_passes.capture import capture
from tilecut_passes.export_model import TRACEABLE
from tilecut_runtime.errors import CaptureError
from zoo import TEXT, ZOO


class NotSeven(nn.Module):
    """Compares its length with a number."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        y = self.proj(x)
        return y * 2 if x.shape[1] == 7 else y


class Halves(nn.Module):
    """Wants an even length."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        a, b = self.proj(x).view(x.shape[0], 2, x.shape[1] // 2, 4).unbind(1)
        return torch.cat([b, a], 1)


class OfFive(nn.Module):
    """Works on sequences of 5 only."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 5)

    def forward(self, x):
        return self.mix(x.transpose(1, 2))


@pytest.mark.parametrize(
    ("model", "shape", "remedy", "dims"),
    [
        (nn.Linear(4, 4), (2, 6, 4), None, ("batch", "sequence", 4)),
        (OfFive(), (2, 5, 4), "suggested fixes", ("batch", 5, 4)),
        (NotSeven(), (2, 6, 4), "shape guards checked at run time", ("batch", "sequence", 4)),
    ],
)
def test_the_remedy_is_named(model, shape, remedy, dims):
    graph = capture(randomise(model), torch.randn(shape))
    assert graph.input_specs()[0].shape == dims
    assert (
        (remedy in graph.notes[0] and "because export refused at first: " in graph.notes[0])
        if remedy
        else not graph.notes
    )
    x = torch.randn(3, *shape[1:])
    assert torch.allclose(graph.run({graph.inputs[0]: x})["output"], model(x), atol=1e-6)


def test_a_related_size_still_captures():
    model = randomise(Halves())
    graph = capture(model, torch.randn(2, 6, 4))
    x = torch.randn(3, 6, 4)
    assert torch.allclose(graph.run({"x": x})["output"], model(x), atol=1e-6)


def test_attention_that_cannot_be_traced_is_replaced_and_given_back():
    model = randomise(transformers.BertModel(transformers.BertConfig(**TEXT)))
    want = capture(model)

    def stubborn(module, query, key, value, mask, **options):
        if bool((query > 1e9).any()):
            raise RuntimeError("never")
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2), None

    transformers.AttentionInterface.register("stubborn", stubborn)
    model.set_attn_implementation("stubborn")
    graph = capture(model)
    assert "attn_implementation 'sdpa' instead of 'stubborn'" in graph.notes[0]
    assert model.config._attn_implementation == "stubborn"
    ids = torch.randint(1, 99, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    assert torch.allclose(graph.run(inputs)["last_hidden_state"], want.run(inputs)["last_hidden_state"], atol=1e-5)


def test_experts_in_a_loop_are_replaced_and_given_back():
    model = randomise(ZOO["mixtral"].build())
    model.set_experts_implementation("eager")
    graph = capture(model)
    assert f"experts_implementation {TRACEABLE['experts_implementation']!r} instead of 'eager'" in graph.notes[0]
    assert model.config._experts_implementation == "eager"
    ids = torch.randint(1, 99, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
    assert torch.allclose(graph.run(inputs)["logits"], want, atol=1e-4)


def test_what_no_remedy_mends_is_one_error():
    class Grows(nn.Module):
        def forward(self, x):
            return x[: int(x.sum())]

    with pytest.raises(CaptureError, match=r"Grows: torch.export stopped at .*test_export_model.py:\d+ `return x"):
        capture(Grows(), torch.ones(2, 3))
