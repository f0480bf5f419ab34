"""`tilecut::attention_varlen` as `tilecut::attention` over a batch of one, for targets that have no packed op.

Before: tilecut::attention_varlen(q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, E], cu_seqlens_q, cu_seqlens_k, slopes)
After: tilecut::attention(q [1, Hq, Tq, D], k, v, bias), everything that hides a pair and ALiBi in the bias
[1, 1|Hq, Tq, Tk] (`packed_bias.py`), made once for all attentions between the same sequences; a query that sees no key
still gives 0. The scores of other sequences are computed and hidden: work and memory grow with Tq x Tk.
Refused with one error, since nothing else can run the op: block lists, dropout, a log-sum-exp that is read.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import PACKED_ATTENTION, Graph, arguments, calls_before, is_call
from tilecut_runtime.errors import LoweringError
from tilecut_targets.packed_bias import packed_bias, sees_a_key

aten = torch.ops.aten


@dataclass(frozen=True)
class UnpackAttention:
    """Every packed attention becomes a dense one with a bias."""

    def match(self, node: fx.Node) -> str | None:
        """Why the dense op cannot express this attention, or None."""
        a = arguments(node)
        if a["block_offsets"] is not None:
            return "it has a block list, which the dense op does not take"
        if a["dropout_p"]:
            return "it has dropout, which is for training"
        if any(is_call(u, operator.getitem) and u.args[1] == 1 and u.users for u in node.users):
            return "its log-sum-exp is read, which the dense op does not give"
        return None

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of attentions.

        Raises:
            LoweringError: a packed attention that no dense one equals.
        """
        biases: dict[str, fx.Node] = {}
        found = [n for n in graph.nodes if is_call(n, PACKED_ATTENTION)]
        for node in found:
            if reason := self.match(node):
                raise LoweringError(
                    f"UnpackAttention: node {node.name}",
                    reason,
                    fix='compile for target="cuda", which has the packed op',
                )
            for user in list(node.users):
                if user.args[1] == 0:
                    user.replace_all_uses_with(_dense(graph, node, biases))
                graph.fx.erase_node(user)
            graph.fx.erase_node(node)
        return len(found)


def _dense(graph: Graph, node: fx.Node, biases: dict[str, fx.Node]) -> fx.Node:
    """The result [Tq, Hq, E] of a packed attention by the dense op."""
    a = arguments(node)
    rules = [a[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "causal", "window", "global_tokens")]
    key = str([*rules, a["q"].meta["val"].dtype])
    with calls_before(graph, node) as call:
        if key not in biases:
            biases[key] = call(packed_bias, a["q"], a["k"], *rules)
        q, k, v = (call(aten.transpose.int, call(aten.unsqueeze.default, a[name], 0), 1, 2) for name in "qkv")
        out = call(
            torch.ops.tilecut.attention.default,
            q,
            k,
            v,
            None,
            biases[key],
            None,
            scale=a["scale"],
            causal="none",
            window=[-1, -1],
            global_tokens=0,
            softcap=a["softcap"],
            dropout_p=0.0,
        )
        out = call(aten.squeeze.dim, call(aten.transpose.int, out, 1, 2), 0)
        # Among its own sequence's keys a query sees itself.
        return out if a["cu_seqlens_q"] is a["cu_seqlens_k"] else call(sees_a_key, out, biases[key])
