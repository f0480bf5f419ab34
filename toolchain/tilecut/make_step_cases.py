"""Reference cases of a model with a key-value cache, and whether its steps equal the pruned model on whole texts.

A case is a step: a prompt read into empty caches, the rows of unequal lengths, or one token more behind caches that earlier
steps filled. Expected logits are the pruned model's own on the whole text; expected caches are those of the graph with the
cache, as far as tokens were written to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilecut_passes.graph import Graph
from tilecut_runtime.cache_layout import LENGTHS, PAST_LENGTHS, CacheLayout
from tilecut_runtime.manifest import Rung
from tilecut_runtime.reference import Case, scaled_error

# Lengths of the rows' prompts, and how many single tokens follow; cut to what the model allows.
TEXTS = (((1,), 1), ((8, 3), 2), ((13, 64, 5, 30), 2), ((256,), 1))
LIMIT = 1e-4


def make_step_cases(pruned: Graph, steps: Graph, layout: CacheLayout, seed: int = 0) -> tuple[list[Case], Rung]:
    """The first and the last step of several batches of texts; how far all steps' logits are from the whole texts'."""
    cases: list[Case] = []
    worst, seen = 0.0, set()
    for i, (prompts, more) in enumerate(TEXTS):
        lengths = torch.tensor([max(1, min(n, layout.max_length - more)) for n in prompts])
        if tuple(lengths.tolist()) in seen or int(lengths.max()) + more > layout.max_length:
            continue
        seen.add(tuple(lengths.tolist()))
        made, error = _run(pruned, steps, layout, lengths, more, seed + i)
        cases += [made[0], made[-1]]
        worst = max(worst, error)
    sizes = ", ".join(f"{'+'.join(map(str, prompts))} tokens and {more} more" for prompts, more in TEXTS)
    detail = f"prompts in one step and tokens one by one, in torch, against whole texts of {sizes}"
    return cases, Rung("steps equal the whole text", "passed" if worst <= LIMIT else "failed", detail, worst, LIMIT)


def _run(
    pruned: Graph, steps: Graph, layout: CacheLayout, lengths: Tensor, more: int, seed: int
) -> tuple[list[Case], float]:
    generator = torch.Generator().manual_seed(seed)
    rows, total = len(lengths), int(lengths.max()) + more
    specs = {spec.name: spec for spec in steps.input_specs()}
    vocabulary = int(steps.output_specs()[0].shape[-1])
    ids = torch.randint(0, vocabulary, (rows, total), generator=generator).to(
        getattr(torch, specs[layout.tokens].dtype)
    )
    others = {name: torch.ones_like(ids) for name in pruned.inputs if name != layout.tokens}
    whole = pruned.run({layout.tokens: ids, **others})[layout.logits]
    caches = {
        name: torch.zeros((rows, int(specs[name].shape[1]), total, int(specs[name].shape[3]))) for name in layout.states
    }
    past, new = torch.zeros(rows, dtype=torch.int64), lengths
    cases, worst = [], 0.0
    for _ in range(1 + more):
        places = (past[:, None] + torch.arange(int(new.max()))).clamp(max=total - 1)
        inputs = {layout.tokens: ids.gather(1, places), PAST_LENGTHS: past, LENGTHS: new, **caches}
        outputs = steps.run(inputs)
        past = past + new
        want = whole[torch.arange(rows), past - 1][:, None]
        worst = max(worst, scaled_error(want.numpy(), outputs[layout.logits].numpy()))
        cases.append(_case(layout, inputs, {**outputs, layout.logits: want}, past))
        caches = {name: outputs[present] for name, present in layout.states.items()}
        new = torch.ones_like(past)
    return cases, worst


def _case(layout: CacheLayout, inputs: dict[str, Tensor], outputs: dict[str, Tensor], written: Tensor) -> Case:
    """A step as a case; places of a cache that no token was written to do not count."""
    valid = {}
    for name, value in outputs.items():
        if name == layout.logits:
            valid[name] = torch.ones(value.shape[:1], dtype=torch.bool).numpy()
        else:
            filled = torch.arange(value.shape[2]) < written[:, None, None]
            valid[name] = filled.expand(value.shape[:3]).numpy()
    return Case({k: v.numpy() for k, v in inputs.items()}, {k: v.numpy() for k, v in outputs.items()}, valid)
