"""`tilecut::attention`: the one attention op of the compiler. torch only; imported only where torch is wanted.

Query head h reads KV head h // (Hq / Hk). A key is visible to a query when every mask lets it through:

    key_padding   key_padding[b, j] is True
    causal        j <= i + shift, with shift = 0 ("top_left") or Sk - Sq ("bottom_right")
    window        -left <= j - (i + shift) <= right, a side of -1 being unbounded
    global_tokens j < global_tokens or i + shift < global_tokens: these see and are seen whatever the window says

and the score of a visible pair is `softcap * tanh(q k^T scale / softcap)` (plain when softcap is 0) plus `bias` plus
`-alibi_slopes[h] * |i + shift - j|`. Softmax runs in float32 (float64 for float64 inputs). A row that sees no key
gives 0. With dropout_p > 0 a weight is kept where `philox.dropout_mask` says so, and divided by 1 - dropout_p.

CPU tensors run `attention_naive`, which is the meaning and the test reference; CUDA tensors run the Triton kernels of
`launch_attention`; other devices have no implementation, and torch says so. A graph holds one node, `tilecut::attention`.
Where a gradient is needed it runs `tilecut::attention_forward`, which keeps the log-sum-exp, and its backward is
`tilecut::attention_backward`: compiled for training the node is that pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilecut_runtime import naive_attention
from tilecut_runtime.attention_checks import check_dense
from tilecut_runtime.errors import InputError


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: str = "none",
    window: Sequence[int] = (-1, -1),
    global_tokens: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Attention as one op, `torch.ops.tilecut.attention`.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hk, Sk, D]; v: [B, Hk, Sk, E]; one floating dtype; Hq a multiple of Hk. Under autocast
            they are cast to its dtype. On CUDA: float16, bfloat16 or float32, D and E multiples of 8 up to 256.
        key_padding: bool [B, Sk], True keeps the key; or None.
        bias: added to the scores, floating point [B|1, Hq|1, Sq|1, Sk|1]; or None.
        alibi_slopes: floating point [Hq], positive; or None. Gets no gradient.
        scale: of q k^T; None is D ** -0.5.
        causal, window, global_tokens, softcap: see the module.
        dropout_p: probability that a weight is dropped, in [0, 1). The op does not ask whether a module trains.
        dropout_seed: int64 [1]; None draws one with torch's generator where dropout_p > 0.

    Returns:
        [B, Hq, Sq, E], q's dtype.

    Raises:
        InputError: shapes, dtypes, devices or options that do not fit.
    """
    q, k, v = autocast(q, k, v)
    options = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "causal": causal,
        "window": list(window),
        "global_tokens": global_tokens,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "dropout_seed": draw_seed(q) if dropout_p and dropout_seed is None else dropout_seed,
    }
    check_dense(q, k, v, key_padding, bias, alibi_slopes, **options)
    return torch.ops.tilecut.attention(q, k, v, key_padding, bias, alibi_slopes, **options)


def attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """What `tilecut::attention` means, in plain torch."""
    masks = _masks(k, key_padding, bias, alibi_slopes, dropout_seed)
    options = naive_attention.Options(scale, causal, window, global_tokens, softcap, dropout_p)
    return naive_attention.forward(q, k, v, masks, options)[0]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as torch's own attention is cast; float64 is left alone."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def draw_seed(q: Tensor) -> Tensor:
    """A seed from torch's generator, int64 [1] on q's device: dropout masks follow torch.manual_seed."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)


def last_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with last dimensions that lie together, as the kernels read them."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def contiguous(x: Tensor | None) -> Tensor | None:
    """A small tensor as the kernels read it."""
    return None if x is None else x.contiguous()


def wide(x: Tensor | None) -> Tensor | None:
    """Slopes as the kernels read them."""
    return None if x is None else x.to(torch.float32).contiguous()


def _masks(k, key_padding, bias, alibi_slopes, dropout_seed) -> naive_attention.Masks:
    return naive_attention.Masks(key_padding, bias, alibi_slopes, None, dropout_seed, max_k=k.shape[2])


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    options = naive_attention.Options(scale, causal, window, global_tokens, softcap, dropout_p)
    check_dense(q, k, v, key_padding, bias, alibi_slopes, **options._asdict(), dropout_seed=dropout_seed)
    return naive_attention.forward(q, k, v, _masks(k, key_padding, bias, alibi_slopes, dropout_seed), options)


def _forward_cuda(q, k, v, key_padding, bias, alibi_slopes, dropout_seed, **options):
    check_dense(q, k, v, key_padding, bias, alibi_slopes, **options, dropout_seed=dropout_seed)
    # Imports triton.
    from tilecut_runtime.launch_attention import forward as launch

    return launch(
        *last_contiguous(q, k, v),
        max_q=q.shape[2],
        max_k=k.shape[2],
        **kernel_inputs(key_padding, bias, alibi_slopes, dropout_seed),
        **options,
    )


def kernel_inputs(key_padding, bias, alibi_slopes, dropout_seed=None) -> dict[str, Any]:
    """The op's tensors besides q, k and v as `launch_attention.Problem` takes them."""
    return {
        "key_padding": contiguous(key_padding),
        "bias": bias,
        "alibi_slopes": wide(alibi_slopes),
        "dropout_seed": dropout_seed,
    }


_forward = torch.library.custom_op("tilecut::attention_forward", _forward_cpu, mutates_args=(), device_types="cpu")
_forward.register_kernel("cuda", _forward_cuda)


@_forward.register_fake
def _(q, k, v, key_padding, bias, alibi_slopes, dropout_seed, **options):
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), lse


@torch.library.custom_op("tilecut::attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; the last is empty unless `bias_grad` asks for it."""
    masks = _masks(k, key_padding, bias, alibi_slopes, dropout_seed)
    options = naive_attention.Options(scale, causal, window, global_tokens, softcap, dropout_p)
    return _contiguous(q, *naive_attention.backward(grad, q, k, v, out, lse, masks, options, bias_grad))


@_backward.register_kernel("cuda")
def _backward_cuda(grad, q, k, v, out, lse, key_padding, bias, alibi_slopes, dropout_seed, *, bias_grad, **options):
    # Imports triton.
    from tilecut_runtime.launch_attention import backward as launch

    grad, q, k, v, out = last_contiguous(grad, q, k, v, out)
    grads = launch(
        grad,
        q,
        k,
        v,
        out,
        lse,
        max_q=q.shape[2],
        max_k=k.shape[2],
        **kernel_inputs(key_padding, bias, alibi_slopes, dropout_seed),
        need_dbias=bias_grad,
        **options,
    )
    return _contiguous(q, *grads)


@_backward.register_fake
def _(grad, q, k, v, out, lse, key_padding, bias, alibi_slopes, dropout_seed, *, bias_grad, **options):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, bias if bias_grad else None))


def _contiguous(q: Tensor, *grads: Tensor | None) -> Any:
    """The layout that the fake kernel promises; an op cannot return None."""
    return tuple(q.new_empty(0) if x is None else x.contiguous() for x in grads)


class _Differentiable(torch.autograd.Function):
    """`tilecut::attention` where a gradient is needed: keeps the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, key_padding, bias, alibi_slopes, dropout_seed, options):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.tilecut.attention_forward(
                q, k, v, key_padding, bias, alibi_slopes, dropout_seed, **options
            )
        ctx.save_for_backward(q, k, v, out, lse, key_padding, bias, alibi_slopes, dropout_seed)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, *grads):
        if ctx.needs_input_grad[5]:
            refuse_slopes("tilecut.attention")
        dq, dk, dv, d_bias = torch.ops.tilecut.attention_backward(
            grads[0].contiguous(), *ctx.saved_tensors, **ctx.options, bias_grad=ctx.needs_input_grad[4]
        )
        return dq, dk, dv, None, d_bias if ctx.needs_input_grad[4] else None, None, None, None


def refuse_slopes(where: str) -> None:
    """ALiBi slopes that want a gradient."""
    fix = "detach them, or pass -slopes * distance as the bias" if where == "tilecut.attention" else "detach them"
    raise InputError(where, "alibi_slopes gets no gradient", fix=fix)


def differentiable_where_needed(op: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The Autograd implementation of `tilecut::op`: `function` where a gradient is needed, else the op itself."""

    def run(*given: Tensor | None, dropout_seed: Tensor | None = None, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
            return function.apply(*given, dropout_seed, options)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.tilecut, op)(*given, **options, dropout_seed=dropout_seed)

    return run


def _attention_cpu(q, k, v, key_padding, bias, alibi_slopes, *, dropout_seed=None, **options):
    return _forward_cpu(q, k, v, key_padding, bias, alibi_slopes, dropout_seed, **options)[0]


def _attention_cuda(q, k, v, key_padding, bias, alibi_slopes, *, dropout_seed=None, **options):
    return _forward_cuda(q, k, v, key_padding, bias, alibi_slopes, dropout_seed, **options)[0]


# torch.library.custom_op has an autograd of its own, which cannot run another op; so this op is defined by hand.
_LIBRARY = torch.library.Library("tilecut", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? bias, Tensor? alibi_slopes, *, float scale, "
    "str causal, SymInt[] window, SymInt global_tokens, float softcap, float dropout_p, Tensor? dropout_seed=None) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("attention", _attention_cpu, "CPU")
_LIBRARY.impl("attention", _attention_cuda, "CUDA")
_LIBRARY.impl("attention", differentiable_where_needed("attention", _Differentiable), "Autograd")


@torch.library.register_fake("tilecut::attention", lib=_LIBRARY)
def _(q, k, v, key_padding, bias, alibi_slopes, **options):
    return q.new_empty((*q.shape[:3], v.shape[-1]))
