"""Architectures of the zoo through every runtime behind "edge:"; the whole table is slow."""

import functools

import pytest
import torch

from checks import emit, randomise
from tilecut_passes.capture import capture
from tilecut_runtime.errors import LoweringError
from tilecut_targets.edge.find_runtime import RUNTIMES, find_runtime
from zoo import ZOO

QUICK = {"portable": ("gpt2", "llama_gqa", "vit"), "openvino": ("llama_gqa", "vit"), "qnn": ("llama_gqa",)}
# What a runtime cannot take: word -> name -> what its error says.
REFUSED = {
    # Experts, and shapes of which XNNPACK has two dynamic sizes to work out.
    "executorch": dict.fromkeys(("mixtral", "qwen2_moe", "gptj", "wav2vec2"), "executorch refused the model"),
}


@functools.lru_cache(maxsize=2)
def graph_of(name):
    torch.manual_seed(0)
    built = ZOO[name].build()
    model, example = built if isinstance(built, tuple) else (built, None)
    return capture(randomise(model), example)


def check(word, name, folder):
    target = find_runtime(word)
    if name in REFUSED.get(word, {}):
        with pytest.raises(LoweringError, match=REFUSED[word][name]):
            emit(target, graph_of(name), folder)
        return
    made = emit(target, graph_of(name), folder, {"batch": 2, "sequence": 12})
    rungs = {r.name: r for r in target.verify(made.folder, made.manifest, made.cases)}
    equal = rungs["artifact equals pruned model"]
    assert equal.status == "passed" and equal.figure is not None and equal.figure < 1e-4, equal


@pytest.mark.parametrize(("word", "name"), [(word, name) for word, names in QUICK.items() for name in names])
def test_a_few_architectures_give_their_numbers(word, name, tmp_path):
    check(word, name, tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("word", [None, *RUNTIMES])
def test_every_architecture_gives_its_numbers_or_one_error(name, word, tmp_path):
    check(word, name, tmp_path / "a")
