"""The fractal model: what it says of one product and of attention, that it counts what the graph has, and a budget in it."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checks import mlp_graph, randomise
from test_wave_model import model_of
from tilecut_passes.capture import capture
from tilecut_targets.ascend.chips import CHIPS
from tilecut_targets.ascend.fractal_model import attention_ms, product_ms
from tilecut_targets.ascend.target import AscendTarget

B3 = CHIPS["Ascend910B3"]
HALF = "float16"


def floor_ms(multiplies, numbers, chip=B3, dtype=HALF):
    return max(2 * multiplies / (chip.tflops * 1e9), numbers * (2 if dtype == HALF else 4) / (chip.gigabytes * 1e6))


def test_full_waves_run_at_the_peak_and_one_more_row_costs_more():
    m, n, k = 128 * 20, 256 * 4, 8192
    full = product_ms(m, n, k, B3, HALF)
    assert full == pytest.approx(floor_ms(m * n * k, 0))
    assert full < product_ms(m + 1, n, k, B3, HALF) <= 2 * full


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391", "Ascend950PR_9589", "Ascend310P3", "Ascend310B1", "Ascend910A"])
@pytest.mark.parametrize("dtype", ["float32", HALF])
def test_it_never_promises_more_than_the_peak_and_never_falls(soc, dtype):
    chip = CHIPS[soc]
    sizes = (1, 16, 17, 100, 128, 1000, 4096, 4097)
    for m, n, k in itertools.product(sizes, repeat=3):
        assert product_ms(m, n, k, chip, dtype) >= floor_ms(m * n * k, m * k + k * n + m * n, chip) * (1 - 1e-9)
    for a, b in itertools.pairwise(sizes):
        for left, right in (((a, 512, 512), (b, 512, 512)), ((512, a, 512), (512, b, 512)), ((512, 512, a), (512, 512, b))):
            assert product_ms(*left, chip, dtype) <= product_ms(*right, chip, dtype) * (1 + 1e-9)


def test_every_side_costs_whole_fractals():
    big = 20 * 256 * 16
    for place in range(3):
        of = lambda n, place=place: product_ms(*[n if i == place else big for i in range(3)], B3, HALF)
        assert of(1025) == pytest.approx(of(1040)) and of(1024) < of(1025)


def test_float32_products_take_four_times_as_long_where_the_cube_has_them():
    many = (128 * 20, 1024, 8192)
    assert product_ms(*many, B3, "float32") == pytest.approx(4 * product_ms(*many, B3, HALF))
    p3 = CHIPS["Ascend310P3"]
    assert product_ms(*many, p3, "float32") == product_ms(*many, p3, HALF)


def test_attention_costs_its_template_and_waves_of_heads():
    one = lambda programs, width: attention_ms(programs, 1024, width, 1024, B3)
    assert one(5, 48) == one(5, 64) < one(5, 72) == one(5, 80)
    assert one(6, 64) > one(5, 64)


def test_the_whole_is_the_sum_of_its_products():
    model, counter, groups = model_of(mlp_graph(neurons=256), AscendTarget("fp16"), {"batch": 1000})
    dense = {g.name: g.size for g in groups}
    terms = [counter.sizes_of(term) for term in counter.terms]
    want = sum(product_ms(*sizes, B3, HALF) for sizes in terms)
    assert model.total(dense) == pytest.approx(want)
    assert model.facts["chip"] == "Ascend910B3" and "not measured" in model.notes[0]
    assert model.rest < model.total(dict.fromkeys(dense, 128)) <= model.total(dense)


def test_a_budget_counts_every_group_and_halves_cost_less():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=128, max_position_embeddings=512,
    )  # fmt: skip
    graph = capture(randomise(LlamaForCausalLM(config).eval()), {"input_ids": torch.ones(2, 9, dtype=torch.long)})
    model, counter, groups = model_of(graph, AscendTarget("Ascend310P3"), {"batch": 64})
    assert sorted(name for names, _ in model.layers for name in names) == sorted(g.name for g in groups)
    dense = {g.name: g.size for g in groups}
    assert model.total(dense) >= floor_ms(sum(counter.macs_of(term) for term in counter.terms), 0, CHIPS["Ascend310P3"])
    for name in dense:
        assert model.total({**dense, name: max(1, dense[name] // 2)}) < model.total(dense)
