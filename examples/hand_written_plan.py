"""A plan of your own: choose the units yourself, see masked and cut agree, and let the enforce passes make it legal.

Run it:  python examples/hand_written_plan.py
"""

import torch
import transformers

from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.enforce_block_multiple import EnforceBlockMultiple
from tilecut_passes.enforce_power_of_two_heads import EnforcePowerOfTwoHeads
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes

if __name__ == "__main__":
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=192, num_hidden_layers=2, num_attention_heads=6, intermediate_size=768
    )
    graph = capture(transformers.BertModel(config).eval())

    # What can be cut, and what one unit of it owns.
    groups = [g for g in find_groups(infer(graph)) if g.kind in ("heads", "neurons")]
    for group in groups:
        print(f"{group.name}: {group.size} {group.kind}, {len(group.members)} members")

    # Five heads and 700 neurons stay: shapes that no kernel likes.
    keep = {"heads": 5, "neurons": 700}
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: list(range(keep[g.kind])) for g in groups})
    masked, cut, legal = graph.copy(), graph.copy(), graph.copy()
    run_passes(masked, [Mask(plan)])
    run_passes(cut, [Prune(plan)])
    run_passes(legal, [Prune(plan), EnforcePowerOfTwoHeads(), EnforceBlockMultiple(block=64)])

    ids = torch.randint(0, 1000, (2, 17))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    want = masked.run(inputs)
    print(f"cut against masked:            {largest_error(want, cut.run(inputs)):.1e}")
    print(f"padded to 8 heads of 32, 704:  {largest_error(want, legal.run(inputs)):.1e}")
    for name in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.intermediate.dense.weight"):
        print(name, *(list(g.tensor(name).shape) for g in (graph, cut, legal)))
