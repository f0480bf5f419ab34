"""What can be asked of recovery."""

import pytest

from tilecut import PruneConfig
from tilecut.recovery_config import Recovery
from tilecut_runtime.errors import ConfigError


def test_every_field_says_what_it_is():
    assert all(field.description for field in Recovery.model_fields.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "Recovery: bad epochs; got 0; wanted Input should be greater than 0"),
        ({"learning_rate": 1.0}, "bad learning_rate; got 1.0"),
        ({"precision": "fp16"}, "bad precision; got 'fp16'; wanted Input should be 'fp32' or 'bf16'"),
        ({"rate": 1}, "bad rate; got 1; wanted one of epochs, learning_rate"),
        ({"floor": 0.9}, "floor needs steps of at least 2"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        Recovery(**options)


def test_it_is_a_field_of_the_config():
    config = PruneConfig(finetune=Recovery(epochs=5))
    assert config.finetune == Recovery(epochs=5)
    assert PruneConfig(**config.model_dump()) == config
    with pytest.raises(ConfigError, match="bad epochs"):
        PruneConfig(finetune={"epochs": 0})
