"""The loss that a model of transformers computes from its labels, for its pruned graph, which ends at the logits.

The functions are transformers' own (`PreTrainedModel.loss_function`), chosen by the class's name as it chooses them. An
encoder-decoder's labels are its decoder's targets in place, where a causal model's are shifted by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from tilecut_runtime.errors import InputError

LABELS = ("labels", "start_positions", "end_positions")
# Losses of one tensor of logits and one of labels.
PLAIN = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
    "ForTokenClassification",
)


def original_loss(model: Any, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], options: Any) -> Tensor:
    """The loss of a model's outputs.

    Args:
        labels: what was given of `LABELS`.
        options: what the Trainer hands on to the loss, such as num_items_in_batch.

    Raises:
        InputError: it is not known how the model's class computes its loss, or from which outputs.
    """
    kind = loss_kind(model)
    if kind == "ForQuestionAnswering" and {"start_logits", "end_logits"} <= outputs.keys():
        if not {"start_positions", "end_positions"} <= labels.keys():
            raise _unknown(model, "needs start_positions and end_positions", labels)
        spans = {name: labels[name] for name in ("start_positions", "end_positions")}
        return LOSS_MAPPING[kind](outputs["start_logits"], outputs["end_logits"], **spans, **options)
    if kind in PLAIN and "logits" in outputs and labels.keys() == {"labels"}:
        logits = outputs["logits"]
        given = {"labels": labels["labels"].to(logits.device), "config": model.config, "vocab_size": logits.shape[-1]}
        logits_name = "pooled_logits" if "Classification" in kind and kind != "ForTokenClassification" else "logits"
        return LOSS_MAPPING[kind](**{logits_name: logits}, **given, **options)
    raise _unknown(model, "its loss is not known here", labels)


def loss_kind(model: Any) -> str | None:
    """The key of transformers' loss, or None."""
    kind = getattr(model, "loss_type", None)
    if kind == "ForConditionalGeneration" or (kind is None and type(model).__name__.endswith("LMHeadModel")):
        return "ForMaskedLM" if model.config.is_encoder_decoder else "ForCausalLM"
    return kind


def _unknown(model: Any, problem: str, labels: Mapping[str, Tensor]) -> InputError:
    return InputError(
        type(model).__name__, problem, got=", ".join(labels), fix="compute it from the outputs, and give no labels"
    )
