import pytest

from tilecut.config import AT, PRESETS, PruneConfig, find_config
from tilecut_runtime.errors import ConfigError


def test_presets_are_what_the_documentation_says():
    assert {name: (c.sparsity, c.block) for name, c in PRESETS.items()} == {
        "edge": (0.6, 64),
        "cloud": (0.3, 128),
        "hybrid": (0.4, 128),
    }
    for name, preset in PRESETS.items():
        assert find_config(name) is preset
    assert find_config(None) is None


def test_sparsity_is_a_half_only_without_any_budget():
    assert PruneConfig().cut_fraction == 0.5
    assert PruneConfig(max_params=10).cut_fraction is None
    assert PruneConfig(max_params=10, sparsity=0.2).cut_fraction == 0.2
    assert PruneConfig(num_heads_keep=2).cut_fraction is None


def test_sizes_fill_in_what_at_leaves_out():
    assert PruneConfig(at={"sequence": 7}).sizes() == {**AT, "sequence": 7}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, "bad sparsity; got 1.0; wanted Input should be less than 1"),
        ({"sparsity": -0.5}, "bad sparsity; got -0.5"),
        ({"sparsity": float("nan")}, "bad sparsity"),
        ({"sparcity": 0.5}, "bad sparcity; got 0.5; wanted one of sparsity, max_macs"),
        ({"block": 0}, "bad block; got 0"),
        ({"num_heads_keep": 0}, "bad num_heads_keep"),
        ({"method": "lasso"}, "method 'lasso' is none of table, fisher, obs, fisher_block"),
        ({"importance": "lasso"}, "importance 'lasso' is none of obs, fisher"),
        ({"block": 64, "adapt_block": 0.1}, "adapt_block chooses the block"),
        ({"mixture": 1.0}, "bad mixture"),
        ({"max_latency_ms": 0}, "bad max_latency_ms"),
        ({"kinds": ("heads", "toes")}, "kind 'toes' is none of heads, kv_groups, queries, neurons"),
        ({"kinds": ()}, "kinds is empty"),
        ({"seed": -1}, "bad seed; got -1"),
        ({"seed": 2**63}, "bad seed; got 9223372036854775808"),
        ({"at": {"sequence": 0}}, "must be positive"),
        ({"tokens": {2: 0}}, "tokens {2: 0.0}: what stays is a fraction above 0 and at most 1"),
        ({"tokens": {2: 1.5}}, "what stays is a fraction above 0 and at most 1"),
        ({"tokens": "half"}, "bad tokens"),
    ],
)
def test_bad_values_are_one_line(given, message):
    with pytest.raises(ConfigError) as caught:
        PruneConfig(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        PruneConfig().sparsity = 0.1


@pytest.mark.parametrize("wanted", ["mobile", 3, {"sparsity": 0.5}])
def test_unknown_presets(wanted):
    with pytest.raises(ConfigError, match="unknown preset"):
        find_config(wanted)
