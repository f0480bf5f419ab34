"""Every importance finds units that were planted dead, on every kind of model; and no two rank the real one alike."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from checks import TEXTS, groups_of, minilm_folder, minilm_graph
from score_models import batches_of, kill, scored
from tilecut_passes.calibration import check_batches
from tilecut_passes.score import IMPORTANCES, score


@pytest.mark.parametrize("model", ["bert", "llama", "mlp", "conv"])
@pytest.mark.parametrize("method", list(IMPORTANCES))
def test_planted_dead_units_go_first(method, model):
    """Of every group, one unit whose outgoing weights are zero, and one whose incoming weights and biases are.

    Not every method can see both by its definition. Attention strength sees nothing behind the softmax or the
    activation, so it must find the second kind: heads that attend to all keys alike, neurons that never fire. A norm of
    everything owned need not be smallest where one half is zero, so its dead units are dead on both sides.
    """
    shared, groups = scored(model)
    graph = shared.copy()
    sides = ("incoming",) if method == "attention" else ("incoming", "outgoing")
    groups = [g for g in groups if g.kind != "queries"]
    for group in groups:
        for unit, side in enumerate(sides, start=1):
            kill(graph, group, unit, side)
            if method.startswith("magnitude"):
                kill(graph, group, unit, "outgoing" if side == "incoming" else "incoming")
    rankings = score(method, graph, groups, batches_of(model, graph))
    assert {g.name for g in groups} == set(rankings)
    for group in groups:
        dead = set(range(1, 1 + len(sides)))
        assert set(rankings[group.name].order[: len(dead)]) == dead


@pytest.mark.parametrize("method", [m for m in IMPORTANCES if m != "attention"])
def test_dead_query_heads_go_first(method):
    """The queries with index 1, over all KV groups."""
    shared, groups = scored("llama")
    graph = shared.copy()
    queries = [g for g in groups if g.kind == "queries"]
    for group in queries:
        kill(graph, group, 1, "outgoing")
    rankings = score(method, graph, queries, batches_of("llama", graph))
    assert [ranking.order[0] for ranking in rankings.values()] == [1, 1]


@pytest.mark.parametrize("method", [m for m in IMPORTANCES if m not in ("attention", "magnitude", "magnitude_l1")])
@pytest.mark.parametrize("spelling", ["einsum", "bmm", "three"])
def test_a_dead_expert_goes_first(method, spelling):
    """An expert without down projection; its router still opens, so its norm is no less than that of others."""
    shared, groups = scored(spelling)
    graph = shared.copy()
    (experts,) = [g for g in groups if g.size == 5]
    down = graph.tensor("down").detach().clone()
    down[3] = 0
    graph.set_tensor("down", torch.nn.Parameter(down))
    ranking = score(method, graph, [experts], batches_of(spelling, graph))[experts.name]
    assert ranking.order[0] == 3


@pytest.mark.slow
def test_no_two_importances_rank_the_real_model_alike():
    """Every group of all-MiniLM-L6-v2: no two importances give the same order anywhere."""
    graph = minilm_graph()
    texts = [line.rsplit("\t", 1)[-1] for line in TEXTS.read_text(encoding="utf-8").splitlines()[1:13]]
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    batches = [dict(tokenizer(texts[i : i + 4], padding=True, return_tensors="pt")) for i in (0, 4, 8)]
    for i, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(i)
        batch["labels"] = torch.randn(*batch["input_ids"].shape, 384, generator=generator)
    groups = groups_of(graph)
    found = {method: score(method, graph, groups, check_batches(graph, batches)) for method in IMPORTANCES}
    for one, other in itertools.combinations(found, 2):
        assert all(found[one][g.name].order != found[other][g.name].order for g in groups), (one, other)
