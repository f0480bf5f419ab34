"""What a residual stream's calls must be before it can be turned: norms that only scale, and heads with tensors of their own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx, nn

from tilecut_passes.graph import Graph, arguments, calls_before, is_call

aten = torch.ops.aten
NORM = aten.rms_norm.default


def split_norms(graph: Graph, names: Collection[str]) -> None:
    """LayerNorms, of what has no mean, as RMS norms and a sum."""
    for node in [n for n in graph.nodes if n.name in names]:
        a = arguments(node)
        with calls_before(graph, node) as call:
            made = call(NORM, a["input"], a["normalized_shape"], a["weight"], a["eps"])
            if a["bias"] is not None:
                made = call(aten.add.Tensor, made, a["bias"])
        node.replace_all_uses_with(made)
        graph.fx.erase_node(node)


def untie_heads(graph: Graph, names: Collection[str]) -> None:
    """Tables that products read too become two tensors, under both of the model's names where it ties them."""
    for name in sorted(names):
        held = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
        users = [user for n in held for user in n.users]
        lookups = [user for user in users if is_call(user, aten.embedding.default)]
        products = [user for user in users if user not in lookups]
        if not lookups or not products:
            continue
        own = next((alias for alias, kept in graph.aliases.items() if kept == name), None)
        graph.aliases.pop(own or "", None)
        own = own or f"tilecut_untied_{name.replace('.', '_')}"
        # The table keeps the name of the module that looks words up.
        moved = lookups if own.rpartition(".")[0] in _modules(lookups[0]) else products
        tensor = graph.tensor(name)
        made = graph.add_tensor(own, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
        for user in moved:
            for n in held:
                user.replace_input_with(n, made)


def _modules(node: fx.Node) -> set[str]:
    """The paths of the modules that a call is in, where capture noted them; the model's own is not among them."""
    return {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()} - {""}
