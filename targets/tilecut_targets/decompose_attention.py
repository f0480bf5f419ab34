"""`tilecut::attention` as MatMul and Softmax: what every ONNX target falls back to for a node it has no fused op for."""

from __future__ import annotations

import torch
from torch import Tensor

from tilecut_runtime.errors import LoweringError
from tilecut_targets.window_bias import keys_behind, outside_window


def decomposed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: list[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """tilecut::attention as MatMul and Softmax. A row without a key gets some finite mixture of the values.

    Raises:
        LoweringError: the attention drops weights, which a deployed graph does not.
    """
    refuse_dropout("decomposed_attention", dropout_p)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    behind = keys_behind(q, k, causal)
    scores = scores_of(q, k, behind, bias, alibi_slopes, scale, softcap)
    dropped = []
    if max(window) >= 0:
        dropped.append(outside_window(behind, window, global_tokens))
    if causal != "none":
        dropped.append(behind < 0)
    if key_padding is not None:
        dropped.append(~key_padding[:, None, None, :])
    for mask in dropped:
        scores = scores.masked_fill(mask, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1) @ v


def refuse_dropout(where: str, dropout_p: float) -> None:
    """A deployed graph drops no weights."""
    if dropout_p:
        raise LoweringError(where, "dropout is for training", got=dropout_p, wanted=0.0, fix="call model.eval() first")


def scores_of(
    q: Tensor, k: Tensor, behind: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """The scores [B, H, Sq, Sk] before anything is hidden, for as many KV heads as heads; `behind` is `keys_behind`'s."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + finite(bias)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * behind.abs().to(q.dtype)
    return scores


def finite(bias: Tensor) -> Tensor:
    """A bias whose -inf is a number that still hides a key: a row of -inf would be NaN, and spread through the layers.

    Half of the least number, so that a negative score beside it does not make it -inf again.
    """
    return torch.clamp_min(bias, torch.finfo(bias.dtype).min / 2)
