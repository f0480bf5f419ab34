"""What the table of models shows of one of them: what can be cut, what is frozen and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from checks import ROOT
from tilecut.config import DEFAULT_KINDS
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.graph import Graph
from zoo import ZOO

# A vocabulary is cut to a corpus, whatever the model.
KINDS = (*DEFAULT_KINDS, "experts")
README = ROOT / "README.md"
BEGIN, END = "<!-- models: made by `make models` -->", "<!-- end of models -->"
# The share that needs no cause: a router, a convolution between the layers.
HARDLY_ANY = 0.05
HEADER = ("models", "what is cut", "frozen MACs", "why")


@dataclass(frozen=True)
class Support:
    """`kinds` that are found, and the share of attention and FFN MACs that none of them takes part in."""

    kinds: tuple[str, ...]
    frozen: float
    why: str

    @property
    def cells(self) -> tuple[str, str, str]:
        """The table's columns but the first."""
        return ", ".join(self.kinds), f"{self.frozen:.0%}" if self.why else f"< {HARDLY_ANY:.0%}", self.why


def support_of(graph: Graph, why: str) -> Support:
    """What the compiler can cut of a captured model."""
    groups = groups_by_kind(graph)
    return Support(tuple(groups), frozen_share(graph), why)


def groups_by_kind(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Sizes of the groups that may be cut, in graph order."""
    found = [(g.kind, g.size) for g in find_groups(infer(graph))]
    return {kind: sizes for kind in KINDS if (sizes := tuple(n for k, n in found if k == kind))}


def frozen_share(graph: Graph, kinds: Sequence[str] = KINDS) -> float:
    """The share of the MACs of attention and FFN that cannot be cut, at a batch of 1 and 64 tokens.

    These are the contractions of activations with one another, and of weights in layers: those whose name holds a
    number (`encoder.layer.0.output.dense.weight`), or any in a model without numbers. Stems and heads do not count.
    """
    axes = infer(graph)
    groups = find_groups(axes)
    counter = MacCounter(axes, groups, {"batch": 1, "sequence": 64})
    weights = {n.name: [str(x.target) for x in n.all_input_nodes if x.op == "get_attr"] for n in graph.nodes}
    has_numbers = any(_numbered(name) for name in graph.tensors)
    counted = {
        name for name, held in weights.items() if not held or not has_numbers or any(_numbered(one) for one in held)
    }
    free = {id(t) for g in groups if g.kind in kinds for t in counter.terms_of([g.name])}
    total = frozen = 0
    for term in counter.terms:
        if term.node in counted:
            macs = counter.macs_of(term)
            total += macs
            frozen += 0 if id(term) in free else macs
    return frozen / total


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def table(rows: Mapping[str, Support]) -> str:
    """The table in Markdown: models of equal support share a line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, one in rows.items():
        lines.setdefault(one.cells, []).append(ZOO[name].title)
    body = [(", ".join(titles), *cells) for cells, titles in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [HEADER, ("---",) * len(HEADER), *body])


def titles_in_readme(one: Support) -> Iterable[str]:
    """The models that README lists with this support."""
    text = README.read_text(encoding="utf-8")
    for line in text[text.index(BEGIN) : text.index(END)].splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if cells[1:] == one.cells:
            return cells[0].split(", ")
    return []


def write_readme(rows: Mapping[str, Support]) -> None:
    """Put the table between README's markers."""
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:start]}\n{table(rows)}\n{text[end:]}", encoding="utf-8")
