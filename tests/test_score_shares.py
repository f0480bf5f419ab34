"""Importances of batches that several processes share are those of one process."""

import pytest

from score_models import batches_of, scored
from simulate_processes import simulate_processes
from tilecut_passes.score import IMPORTANCES, score


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("method", list(IMPORTANCES))
def test_processes_that_share_the_batches_agree_with_one(method, count, monkeypatch):
    """Also where there are more processes than batches."""
    graph, groups = scored("bert")
    batches = batches_of("bert", graph, count=3)
    alone = score(method, graph, groups, batches)
    for rankings in simulate_processes(monkeypatch, count, lambda: score(method, graph, groups, batches)):
        for name, ranking in rankings.items():
            assert ranking.order == alone[name].order
            assert ranking.losses == pytest.approx(alone[name].losses, rel=1e-5)
