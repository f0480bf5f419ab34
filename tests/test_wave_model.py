"""The wave model: what it says of one product, that it counts what the graph has, and that a budget in it is met."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checks import compiled, mlp_graph, randomise
from tilecut import PruneConfig
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cuda.chips import ARCHS, CHIPS, OF_ARCH, SHARED_LIMIT, read_wish
from tilecut_targets.cuda.target import CudaTarget
from tilecut_targets.cuda.wave_model import attention_ms, product_ms

H100 = CHIPS["h100"]
HALF = "bfloat16"


def floor_ms(multiplies, numbers, chip=H100, dtype=HALF):
    return max(
        2 * multiplies / (chip.tflops[dtype] * 1e9), numbers * (2 if dtype != "float32" else 4) / (chip.gigabytes * 1e6)
    )


def test_full_waves_run_at_the_peak_and_one_more_tile_costs_up_to_a_wave():
    m, n, k = 128 * 12, 256 * 11, 8192
    full = product_ms(m, n, k, H100, HALF)
    assert full == pytest.approx(floor_ms(m * n * k, 0))
    more = product_ms(m + 1, n, k, H100, HALF)
    assert full * 1.05 < more <= full * 2


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_never_promises_more_than_the_data_sheet_and_never_falls(chip, dtype):
    sizes = (1, 64, 100, 128, 1000, 4096, 4097)
    last = {}
    for m, n, k in itertools.product(sizes, repeat=3):
        ms = product_ms(m, n, k, chip, dtype)
        assert ms >= floor_ms(m * n * k, m * k + k * n + m * n, chip, dtype) * (1 - 1e-9)
        assert ms >= last.get((m, n), 0) * (1 - 1e-9)
        last[m, n] = ms
    for a, b in itertools.pairwise(sizes):
        assert product_ms(a, 512, 512, chip, dtype) <= product_ms(b, 512, 512, chip, dtype)
        assert product_ms(512, a, 512, chip, dtype) <= product_ms(512, b, 512, chip, dtype)


def test_small_products_cost_their_bytes():
    assert product_ms(1, 4096, 4096, H100, HALF) == pytest.approx(2 * (4096**2 + 2 * 4096) / (3350 * 1e6))


def test_a_head_too_many_opens_a_wave():
    full, more = (attention_ms(heads, 128 * 11, 64, 4096, H100, HALF) for heads in (12, 13))
    assert more == pytest.approx(2 * full)


def model_of(graph, target, at=None):
    axes = infer(graph)
    groups = [g for g in find_groups(axes) if g.kind in PruneConfig().kinds]
    at = {"batch": 1, "sequence": 128, "threads": 1, **(at or {})}
    counter = MacCounter(axes, find_groups(axes), at)
    sets = counter.groups_together([g.name for g in groups])
    return target.cost(graph, axes, groups, sets, at, target.lattice(), None, lambda done, of: None), counter, groups


def test_the_whole_is_the_sum_of_its_products():
    graph = mlp_graph(neurons=256)
    target = CudaTarget("h100,bf16")
    model, counter, groups = model_of(graph, target, {"batch": 1000})
    dense = {g.name: g.size for g in groups}
    want = sum(product_ms(*_flat(counter.sizes_of(term)), H100, HALF) for term in counter.terms)
    assert model.total(dense) == pytest.approx(want)
    assert model.facts["chip"] == "h100" and "not measured" in model.notes[0]
    smaller = dict.fromkeys(dense, 64)
    assert model.rest < model.total(smaller) <= model.total(dense)


def _flat(sizes):
    *outer, n, k = sizes
    m = 1
    for size in outer:
        m *= size
    return m, n, k


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=128, max_position_embeddings=512,
    )  # fmt: skip
    return randomise(LlamaForCausalLM(config).eval())


def test_every_product_of_a_model_is_priced_once(llama):
    ids = torch.ones(2, 9, dtype=torch.long)
    model, counter, groups = model_of(capture(llama, {"input_ids": ids}), CudaTarget("a100,fp16"), {"batch": 64})
    priced = [name for names, _ in model.layers for name in names]
    assert sorted(priced) == sorted(g.name for g in groups)
    dense = {g.name: g.size for g in groups}
    macs = sum(counter.macs_of(term) for term in counter.terms)
    assert model.total(dense) >= floor_ms(macs, 0, CHIPS["a100"], "float16")
    for name in dense:
        assert model.total({**dense, name: max(1, dense[name] // 2)}) <= model.total(dense)


@pytest.mark.filterwarnings("ignore:no calibration data")
def test_a_budget_of_milliseconds_is_met(llama, tmp_path):
    at = {"batch": 256, "sequence": 128}
    ids = torch.ones(2, 9, dtype=torch.long)
    whole = model_of(capture(llama, {"input_ids": ids}), CudaTarget("orin,fp16"), at)
    dense = whole[0].total({g.name: g.size for g in whole[2]})
    artifact = compiled(
        "cuda:orin,fp16",
        tmp_path / "artifact",
        model=llama,
        config=PruneConfig(sparsity=None, max_latency_ms=0.8 * dense, at=at),
    )
    predicted = artifact.report["predicted_ms"]
    assert predicted["dense"] == pytest.approx(dense)
    assert predicted["pruned"] <= 0.8 * dense
    assert artifact.report["cost_model"]["facts"]["chip"] == "orin"


@pytest.mark.parametrize(
    ("words", "archs", "chip", "dtype"),
    [
        (None, ARCHS, "h100", "float32"),
        ("bf16", ARCHS, "h100", "bfloat16"),
        ("orin", ("sm_87",), "orin", "float32"),
        ("SM_90, fp16", ("sm_90",), "h100", "float16"),
        ("l4,a100,l40s", ("sm_89", "sm_80"), "l4", "float32"),
    ],
)
def test_the_words_of_a_target(words, archs, chip, dtype):
    wish = read_wish(words)
    assert (wish.archs, wish.chip.name, wish.dtype) == (archs, chip, dtype)
    assert CudaTarget(words).tolerance == {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}[dtype]


@pytest.mark.parametrize("words", ["sm_70", "orin;fp16", "fp16,bf16", ",", "cuda"])
def test_other_words_are_refused(words):
    with pytest.raises(ConfigError, match="the cuda target knows no such chip or type|two types"):
        CudaTarget(words)


def test_every_architecture_has_a_chip_and_a_limit():
    assert {chip.arch for chip in CHIPS.values()} == set(OF_ARCH) <= set(SHARED_LIMIT)
    assert set(ARCHS) <= set(OF_ARCH)
