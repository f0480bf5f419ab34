import pytest
from typer.testing import CliRunner

from tilecut import PruneConfig, cli
from tilecut.cli_config import make_config, read_options
from tilecut.config import PRESETS
from tilecut.recovery_config import Recovery
from tilecut_runtime.errors import ConfigError, InputError

PRESET = PRESETS["hybrid"].sparsity


class Seen(Exception):
    """What a command was going to do."""


@pytest.fixture
def config_of(monkeypatch):
    """The config that `tilecut compile` makes of options, read as the shell's."""

    def compile_pruned(model, target, **options):
        raise Seen(options["config"])

    monkeypatch.setattr("tilecut.compile.compile_pruned", compile_pruned)

    def call(*options):
        result = CliRunner().invoke(cli.app, ["compile", "model", *map(str, options)])
        if isinstance(result.exception, Seen):
            return result.exception.args[0]
        assert result.exception is not None
        raise result.exception

    return call


EVERY_FIELD = [
    (("--sparsity", 0.3), {"sparsity": 0.3}),
    (("--max-macs", 10), {"max_macs": 10, "sparsity": None}),
    (("--max-params", 11), {"max_params": 11, "sparsity": None}),
    (("--max-bytes", 12), {"max_bytes": 12, "sparsity": None}),
    (("--max-latency-ms", 2.5), {"max_latency_ms": 2.5, "sparsity": None}),
    (("--max-latency-ms", 2.5, "--sparsity", 0.1), {"max_latency_ms": 2.5, "sparsity": 0.1}),
    (("--attention-sparsity", 0.2), {"attention_sparsity": 0.2, "sparsity": None}),
    (("--num-heads-keep", 3), {"num_heads_keep": 3, "sparsity": None}),
    (("--batch", 2, "--threads", 4), {"at": {"batch": 2, "threads": 4}}),
    (("--sequence", 64), {"at": {"sequence": 64}}),
    (("--kinds", "heads, neurons"), {"kinds": ("heads", "neurons")}),
    (("--kinds", "vocab", "--vocabulary", "a.txt"), {"kinds": ("vocab",), "vocabulary": "a.txt"}),
    (("--block", 32), {"block": 32}),
    (("--rotate",), {"rotate": True}),
    (("--no-rotate",), {"rotate": False}),
    (("--adapt-block", 0.1), {"adapt_block": 0.1, "block": None}),
    (("--power-of-two-heads",), {"power_of_two_heads": True}),
    (("--no-power-of-two-heads",), {"power_of_two_heads": False}),
    (("--keep", "*layer.0.*", "--keep", "heads"), {"keep": ("*layer.0.*", "heads")}),
    (("--min-units", "neurons=64", "--min-units", "heads=2"), {"min_units": {"neurons": 64, "heads": 2}}),
    (("--max-units", "a=b:neurons=128"), {"max_units": {"a=b:neurons": 128}}),
    (("--uniform",), {"uniform": True}),
    (("--method", "fisher"), {"method": "fisher"}),
    (("--importance", "wanda"), {"importance": "wanda"}),
    (("--outputs", "logits,hidden"), {"outputs": ("logits", "hidden")}),
    (("--no-reconstruct",), {"reconstruct": False}),
    (("--mixture", 0), {"mixture": 0.0}),
    (("--cache", ""), {"cache": ""}),
    (("--cache", "there"), {"cache": "there"}),
    (("--offload", "disk"), {"offload": "disk"}),
    (("--seed", 7), {"seed": 7}),
    (("--finetune",), {"finetune": Recovery()}),
    (("--finetune-epochs", 5), {"finetune": Recovery(epochs=5)}),
    (("--finetune-steps", 3, "--finetune-floor", 0.9), {"finetune": Recovery(steps=3, floor=0.9)}),
    (("--finetune-lr", 1e-4), {"finetune": Recovery(learning_rate=1e-4)}),
    (("--finetune-labels",), {"finetune": Recovery(labels="task")}),
    (("--precision", "bf16"), {"finetune": Recovery(precision="bf16")}),
    (("--tokens", "2=0.5", "--tokens", "*layer.4=.25"), {"tokens": {"2": 0.5, "*layer.4": 0.25}}),
    (("--tokens-restored", "own"), {"tokens_restored": "own"}),
    (("--tokens", "search"), {"tokens": "search"}),
    (("--quantize", "int8"), {"quantize": "int8"}),
    (("--checkpoint", "saved"), {"finetune": Recovery(checkpoint="saved")}),
]


@pytest.mark.parametrize(("options", "fields"), EVERY_FIELD, ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "")
def test_an_option_sets_its_field_and_no_other(options, fields, config_of):
    assert config_of(*options) == PruneConfig(**{**PRESETS["hybrid"].model_dump(), **fields})


def test_every_field_has_an_option():
    assert {field for _, fields in EVERY_FIELD for field in fields} == set(PruneConfig.model_fields)


def test_presets(config_of):
    assert config_of() == PRESETS["hybrid"]
    assert config_of("--preset", "edge") == PRESETS["edge"]
    assert config_of("--dense") is None
    with pytest.raises(ConfigError, match="unknown preset; got 'huge'"):
        config_of("--preset", "huge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-units", "neurons"), "--min-units: not a name and a number; got 'neurons'"),
        (("--max-units", "neurons=few"), "--max-units: not a name and a number"),
        (("--max-units", "=3"), "not a name and a number"),
        (("--max-units", "neurons=-3"), "not a name and a number"),
        (("--adapt-block", "0.1", "--block", "16"), "adapt_block chooses the block"),
        (("--max-latency-ms", "0"), "bad max_latency_ms"),
        (("--threads", "0"), "must be positive"),
        (("--finetune-floor", "0.9"), "floor needs steps"),
        (("--precision", "fp8"), "bad precision"),
        (("--method", "luck"), "method 'luck' is none of"),
    ],
)
def test_a_bad_value_is_one_error(options, message, config_of):
    with pytest.raises((ConfigError, InputError), match=message.replace("(", r"\(")):
        config_of(*options)


def test_the_explored_config_takes_no_budget_that_is_swept():
    assert make_config(read_options()).sparsity == PRESET
    assert make_config(read_options(max_params=5)) == PRESETS["hybrid"].model_copy(update={"max_params": 5, "sparsity": None})
