"""Reference cases of a model with a key-value cache, and whether its steps equal the pruned model on whole texts.

A case is a step: a prompt read into empty caches, the rows of unequal lengths, or one token more behind caches that earlier
steps filled. Expected logits are the pruned model's own on the whole text; expected caches are those of the graph with the
cache, as far as tokens were written to them. An encoder, where there is one, has cases of its own: what it reads in front of
each batch of texts, of other lengths than theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilecut.make_cases import make_case, make_inputs
from tilecut_passes.graph import Graph
from tilecut_runtime.cache_layout import BEAMS, LENGTHS, MASK, PAST_LENGTHS, POSITIONS, CacheLayout
from tilecut_runtime.manifest import Rung
from tilecut_runtime.reference import Case, scaled_error

# Of what an encoder reads, in front of each of `TEXTS`.
READ = (1, 9, 40, 200)
# Lengths of the rows' prompts, and how many single tokens follow; cut to what the model allows.
TEXTS = (((1,), 1), ((8, 3), 2), ((13, 64, 5, 30), 2), ((256,), 1))
LIMIT = 1e-4


def make_step_cases(
    pruned: Graph, steps: Graph, encoder: Graph | None, layout: CacheLayout, seed: int = 0
) -> tuple[list[Case], list[Case], Rung]:
    """The first and the last step of several batches, the encoder's cases, and how far all steps are from whole texts."""
    cases: list[Case] = []
    read: list[Case] = []
    worst, seen = 0.0, set()
    for i, (prompts, more) in enumerate(TEXTS):
        lengths = torch.tensor([max(1, min(n, layout.max_length - more)) for n in prompts])
        if tuple(lengths.tolist()) in seen or int(lengths.max()) + more > layout.max_length:
            continue
        seen.add(tuple(lengths.tolist()))
        others = make_inputs(pruned, len(prompts), READ[i], seed + i)
        given: dict[str, Tensor] = {}
        if encoder is not None:
            source = {name: others[name] for name in encoder.inputs}
            given = encoder.run(source)
            read.append(make_case(source, given))
        made, error = _run(pruned, steps, layout, lengths, more, seed + i, others, given)
        cases += made
        worst = max(worst, error)
    sizes = ", ".join(f"{'+'.join(map(str, prompts))} tokens and {more} more" for prompts, more in TEXTS)
    detail = f"prompts in one step and tokens one by one, in torch, against whole texts of {sizes}"
    return cases, read, Rung("steps equal the whole text", "passed" if worst <= LIMIT else "failed", detail, worst, LIMIT)


def _run(
    pruned: Graph,
    steps: Graph,
    layout: CacheLayout,
    lengths: Tensor,
    more: int,
    seed: int,
    others: dict[str, Tensor],
    encoded: dict[str, Tensor],
) -> tuple[list[Case], float]:
    """`others` are the pruned model's inputs, of which those of the tokens' shape are made anew; `encoded` is the encoder's."""
    generator = torch.Generator().manual_seed(seed)
    rows, total = len(lengths), int(lengths.max()) + more
    specs = {spec.name: spec for spec in steps.input_specs()}
    vocabulary = int(steps.output_specs()[0].shape[-1])
    ids = torch.randint(0, vocabulary, (rows, total), generator=generator).to(
        getattr(torch, specs[layout.tokens].dtype)
    )
    shapes = {spec.name: spec.shape for spec in pruned.input_specs()}
    # Masks of the tokens.
    ones = {name: torch.ones_like(ids) for name in pruned.inputs if shapes[name] == shapes[layout.tokens]}
    whole = pruned.run({**others, **ones, layout.tokens: ids})[layout.logits]
    places = 0 if layout.stateful else total
    caches = {
        name: torch.zeros((rows, int(specs[name].shape[1]), places, int(specs[name].shape[3]))) for name in steps.states
    }
    if layout.stateful:
        return _grow(steps, layout, ids, whole, lengths, caches)
    return _fill(steps, layout, ids, whole, lengths, {**caches, **encoded})


def _fill(
    steps: Graph, layout: CacheLayout, ids: Tensor, whole: Tensor, lengths: Tensor, held: dict[str, Tensor]
) -> tuple[list[Case], float]:
    """Steps that write to caches of a fixed size, rows padded on the right; the cases are the first and the last."""
    rows, total = ids.shape
    past, new = torch.zeros(rows, dtype=torch.int64), lengths
    cases, worst = [], 0.0
    for _ in range(1 + total - int(lengths.max())):
        places = (past[:, None] + torch.arange(int(new.max()))).clamp(max=total - 1)
        inputs = {layout.tokens: ids.gather(1, places), PAST_LENGTHS: past, LENGTHS: new, **held}
        outputs = steps.run(inputs)
        past = past + new
        want = whole[torch.arange(rows), past - 1][:, None]
        worst = max(worst, scaled_error(want.numpy(), outputs[layout.logits].numpy()))
        cases.append(_case(layout, inputs, {**outputs, layout.logits: want}, past))
        held = {**held, **{name: outputs[present] for name, present in layout.states.items()}}
        new = torch.ones_like(past)
    return [cases[0], cases[-1]], worst


def _grow(
    steps: Graph, layout: CacheLayout, ids: Tensor, whole: Tensor, lengths: Tensor, caches: dict[str, Tensor]
) -> tuple[list[Case], float]:
    """Steps whose caches grow, rows padded on the left; the case is the prompts', read into empty caches."""
    rows, most = len(lengths), int(lengths.max())
    place = torch.arange(most) - (most - lengths)[:, None]
    mask, positions = (place >= 0).long(), place.clamp(min=0)
    cases, worst = [], 0.0
    for step in range(1 + ids.shape[1] - most):
        inputs = {
            layout.tokens: ids.gather(1, positions),
            MASK: mask,
            POSITIONS: positions,
            BEAMS: torch.arange(rows, dtype=torch.int32),
        }
        outputs = steps.run({**inputs, **caches})
        want = whole[torch.arange(rows), lengths - 1 + step][:, None]
        worst = max(worst, scaled_error(want.numpy(), outputs[layout.logits].numpy()))
        cases.append(_case(layout, inputs, {layout.logits: want}, lengths))
        caches = {name: outputs[present] for name, present in steps.states.items()}
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        positions = (lengths + step)[:, None]
    return cases[:1], worst


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
