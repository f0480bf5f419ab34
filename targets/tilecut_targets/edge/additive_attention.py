"""`tilecut::attention` as MatMul and Softmax whose masks are additions: no comparison and no choice on the device.

What depends on lengths alone (causality, windows) is a constant where these are static. Key padding is multiplied and
added, since the accelerators that this is for have no Where, or a slow one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilecut_targets.decompose_attention import refuse_dropout, scores_of
from tilecut_targets.window_bias import keys_behind, outside_window


def additive_attention(
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
    """tilecut::attention as MatMul, Add and Softmax. A row without a key gets some finite mixture of the values.

    Raises:
        LoweringError: the attention drops weights, which a deployed graph does not.
    """
    refuse_dropout("additive_attention", dropout_p)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        # Joined copies: the accelerators have Concat, and not all of them Expand.
        k, v = (torch.cat([x.unsqueeze(2)] * groups, 2).flatten(1, 2) for x in (k, v))
    # Half of a half for each of two masks: their sum and a score beside it are finite.
    least = torch.finfo(q.dtype).min / 4
    behind = keys_behind(q, k, causal)
    scores = scores_of(q, k, behind, bias, alibi_slopes, scale, softcap)
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if max(window) >= 0:
        hidden = outside_window(behind, window, global_tokens)
    if causal != "none":
        hidden = hidden | (behind < 0)
    if max(window) >= 0 or causal != "none":
        scores = scores + torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, least)
    if key_padding is not None:
        scores = scores + ((1.0 - key_padding.to(q.dtype)) * least)[:, None, None, :]
    return torch.softmax(scores, -1) @ v
