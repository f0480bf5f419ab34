"""What the caller may ask of the training after the cut: `Recovery`, the value of `PruneConfig.finetune`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tilecut.settings import Settings


class Recovery(Settings):
    """How a pruned model is trained on the calibration batches until it follows the dense one again.

    Without `labels` the dense model is the teacher and nothing else is needed.
    """

    epochs: int = Field(default=3, gt=0, description="passes over the calibration batches, after every cut")
    learning_rate: float = Field(default=1e-3, gt=0, lt=1, description="AdamW's step size after the warm-up")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="fraction of the optimizer steps in which it rises from 0")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's, per unit of step size; not on biases and norms")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of a step's gradient; None: any")
    batch_rows: int | None = Field(
        default=16, gt=0, description="rows of a training batch: calibration batches of more are split; None: as they are"
    )
    accumulate: int = Field(default=1, gt=0, description="training batches an optimizer step, over all processes together")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16: products in bfloat16 (autocast); weights, sums and losses stay float32"
    )
    labels: Literal["task"] | None = Field(
        default=None, description="task: the loss of the batches' labels is trained too; None: they are not read"
    )
    distillation: float = Field(
        default=0.5, ge=0, le=1, description="with labels: fraction of the loss that is the distance to the dense model"
    )
    temperature: float = Field(default=2.0, gt=0, description="by which logits are divided before they are compared")
    hidden: float = Field(
        default=1.0, ge=0, description="weight of the distance between hidden states, relative to that between outputs"
    )
    steps: int = Field(default=1, gt=0, description="cuts on the way to the budget, each followed by refit and recovery")
    floor: float | None = Field(
        default=None,
        gt=-1,
        lt=1,
        description="mean cosine to the dense outputs on held-out batches; when a cut ends below it, the cut before "
        "is the result",
    )
    checkpoint: str | None = Field(default=None, description="folder to save to and to resume from; None: nothing is saved")
    checkpoint_every: int = Field(default=50, gt=0, description="optimizer steps between two checkpoints")
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto: the accelerator where there is one")

    @model_validator(mode="after")
    def _consistent(self) -> Recovery:
        if self.floor is not None and self.steps == 1:
            raise ValueError("floor needs steps of at least 2: with one cut there is nothing to go back to")
        return self
