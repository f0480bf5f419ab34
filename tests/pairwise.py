"""Few cases in which every two values of every two parameters meet once: a greedy cover, the same on every run."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Pair = frozenset[tuple[str, Hashable]]


def pairwise(
    parameters: Mapping[str, Sequence[Hashable]], forbidden: Sequence[Mapping[str, Hashable]] = ()
) -> list[dict]:
    """Cases that cover every pair of values, but for those forbidden ({a: x, b: y}), which no case has.

    Each case starts with the first pair that is still missing, then gives the other parameters, in order, the value
    that adds most missing pairs.
    """
    never = {frozenset(pair.items()) for pair in forbidden}
    missing = dict.fromkeys(
        pair
        for a, b in combinations(parameters, 2)
        for x in parameters[a]
        for y in parameters[b]
        if (pair := frozenset({(a, x), (b, y)})) not in never
    )
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in parameters:
            if name not in case:
                case[name] = max(
                    _allowed(case, name, parameters[name], never), key=lambda v: _gain(case, name, v, missing)
                )
        for pair in combinations(case.items(), 2):
            missing.pop(frozenset(pair), None)
        cases.append({name: case[name] for name in parameters})
    return cases


def _allowed(case: Mapping, name: str, values: Sequence[Hashable], never: set[Pair]) -> list[Hashable]:
    allowed = [v for v in values if not any(frozenset({(name, v), other}) in never for other in case.items())]
    assert allowed, f"nothing left for {name} beside {case}"
    return allowed


def _gain(case: Mapping, name: str, value: Hashable, missing: Mapping[Pair, None]) -> int:
    return sum(frozenset({(name, value), other}) in missing for other in case.items())
