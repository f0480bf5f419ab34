"""The compiler's intermediate representation: a functional ATen graph, its tensors, and what its dimensions are called.

A `Graph` wraps a `torch.fx.GraphModule` in which

    placeholders   are the model's tensor inputs, in order, under the caller's names
    get_attr       reads a parameter or buffer, one node a tensor, under its name in the caller's `state_dict`
    call_function  calls an ATen overload, a tilecut op, or integer arithmetic on sizes
    output         is a tuple of tensors, named by `Graph.outputs`

and every node carries `meta["val"]`, a fake tensor with symbolic batch and sequence. Passes rewrite the fx graph in
place; `run_passes` alone cleans up after them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, cast

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

# Importing it registers tilecut::attention_varlen.
from tilecut_runtime import attention_varlen as _attention_varlen_op
from tilecut_runtime.manifest import DimRange, TensorSpec

assert _attention_varlen_op
# What tables of new numbers for old ids are called (`remap_ids.py`).
REMAP = "tilecut_rows_"
PACKED_ATTENTION = torch.ops.tilecut.attention_varlen.default

Returns = Literal["tensor", "tuple", "mapping"]
Size = int | sympy.Expr
CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


@dataclass(frozen=True)
class Refusal:
    """A node that a pass looked at and left alone, and why."""

    by: str
    node: str
    why: str


@dataclass
class Graph:
    """A captured model. `dims` names the symbols of dynamic sizes; `aliases` maps a tied name to the one that is kept.

    `inputs` are the caller's names of the placeholders, in order (fx may have had to rename a node). `states` are the
    inputs that hold a key-value cache, each with the output that continues it: their heads are cut with the model.
    `store` says where new tensors go, for models larger than memory (`disk_tensor.py`); None keeps them as they are.
    A size whose range is one number is static in the specs. `example_sizes` are those of the caller's example inputs.
    `hiding` are the masks in which what is not 0 hides a position, `unclear` bools that may (`find_hiding.py`).
    `rotated` are the groups of hidden width whose channels are not the caller's (`rotate_hidden.py`).
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    returns: Returns = "mapping"
    dims: dict[sympy.Symbol, str] = field(default_factory=dict)
    ranges: dict[str, DimRange] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    store: Callable[[Tensor], Tensor] | None = None
    example_sizes: dict[str, int] = field(default_factory=dict)
    rotated: tuple[str, ...] = ()
    hiding: tuple[str, ...] = ()
    unclear: tuple[str, ...] = ()

    @property
    def fx(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """Every node, in order."""
        return self.module.graph.nodes

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return [n for n in self.nodes if n.op == "placeholder"]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that are returned, in the order of `outputs`."""
        return list(cast(tuple[fx.Node, ...], self.fx.output_node().args[0]))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer that the graph reads, by name."""
        return {n.target: self.tensor(n.target) for n in self.nodes if n.op == "get_attr" and isinstance(n.target, str)}

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer called `name`."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), leaf)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put a parameter (an `nn.Parameter`) or buffer at `name`, making the modules on the way."""
        if self.store is not None:
            stored = self.store(value.detach())
            value = nn.Parameter(stored, value.requires_grad) if isinstance(value, nn.Parameter) else stored
        place_tensor(self.module, name, value)

    def add_tensor(self, name: str, value: Tensor) -> fx.Node:
        """Put a new tensor at `name` and return a get_attr node for it, placed before the first call."""
        self.set_tensor(name, value)
        with self.fx.inserting_before(self.first_call()):
            node = self.fx.get_attr(name)
        node.meta["val"] = self.fake_mode().from_tensor(value, static_shapes=True)
        return node

    def add_input(self, name: str, value: Tensor) -> fx.Node:
        """A new input called `name` behind the others; `value` is fake."""
        with self.fx.inserting_after(self.placeholders[-1]):
            node = self.fx.placeholder(name.replace(".", "_"))
        node.meta["val"] = value
        self.inputs = (*self.inputs, name)
        return node

    def remove_input(self, node: fx.Node) -> None:
        """Remove an input that nothing reads any more."""
        self.inputs = tuple(name for name, one in zip(self.inputs, self.placeholders, strict=True) if one is not node)
        self.fx.erase_node(node)

    def first_call(self) -> fx.Node:
        """The first node that is neither an input nor a tensor: where new get_attr nodes go."""
        return next(n for n in self.nodes if n.op not in ("placeholder", "get_attr"))

    def fake_mode(self) -> FakeTensorMode:
        """The mode whose symbols the sizes are written in."""
        return next(n.meta["val"].fake_mode for n in self.placeholders)

    def copy(self) -> Graph:
        """A graph of its own that shares the tensors; node names are kept."""
        new = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            mapped[node] = new.node_copy(node, lambda n: mapped[n])
            mapped[node].name = node.name
        made = fx.GraphModule(self.module, new)
        return Graph(
            made,
            self.inputs,
            self.outputs,
            self.returns,
            dict(self.dims),
            dict(self.ranges),
            dict(self.aliases),
            dict(self.states),
            list(self.notes),
            list(self.refusals),
            self.store,
            dict(self.example_sizes),
            self.rotated,
            self.hiding,
            self.unclear,
        )

    def in_double(self) -> Graph:
        """A copy with float64 tensors, to tell rounding from mistakes; floating inputs must be float64 then."""
        wide = self.copy()
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point():
                double = tensor.detach().double()
                wide.set_tensor(name, nn.Parameter(double) if isinstance(tensor, nn.Parameter) else double)
        wide.module.recompile()
        return wide

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the graph; no gradients unless the caller enabled them around `differentiable`."""
        with torch.no_grad():
            return self.differentiable(inputs)

    def differentiable(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the graph and keep what autograd needs."""
        return dict(zip(self.outputs, self.module(*(inputs[name] for name in self.inputs)), strict=True))

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of the inputs, dynamic sizes under their names."""
        return tuple(self._spec(name, n.meta["val"]) for name, n in zip(self.inputs, self.placeholders, strict=True))

    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of the outputs, dynamic sizes as expressions of names."""
        return tuple(self._spec(name, n.meta["val"]) for name, n in zip(self.outputs, self.results, strict=True))

    def _spec(self, name: str, value: Tensor) -> TensorSpec:
        fixed = {dim: limits.min for dim, limits in self.ranges.items() if limits.min == limits.max}
        named = {
            symbol: sympy.Integer(fixed[dim]) if dim in fixed else sympy.Symbol(dim) for symbol, dim in self.dims.items()
        }
        sizes = [s if isinstance(s, int) else cast(sympy.Expr, s.xreplace(named)) for s in sizes_of(value)]
        shape = tuple(int(s) if isinstance(s, int) or s.is_Integer else str(s) for s in sizes)
        return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)

    def clean(self) -> None:
        """Remove dead code, lint, recompile."""
        self.remove_dead_code()
        self.fx.lint()
        self.module.delete_all_unused_submodules()
        self.module.recompile()

    def remove_dead_code(self) -> None:
        """Remove what nothing reads."""
        # torch keeps ops that draw random numbers, attention among them; here nothing has effects.
        self.fx.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))

    def propagate(self) -> None:
        """Recompute `meta["val"]` of every node from the inputs' symbolic shapes; raises where a size does not fit."""
        mode = self.fake_mode()
        with mode, enable_python_dispatcher(), torch.no_grad():
            _Propagate(self.module, mode).run(*(n.meta["val"] for n in self.placeholders))

    def row_sizes(self) -> set[str]:
        """Names of the dynamic sizes that count independent rows: the first dimension of an input.

        The tokens of packed sequences are not independent, and their bounds are no rows.
        """
        shapes = (sizes_of(n.meta["val"]) for n in self.placeholders)
        packed = [n for n in self.nodes if is_call(n, PACKED_ATTENTION)]
        tied = {sizes_of(value_of(source(n, i)))[0] for n in packed for i in (0, 1, 3, 4)}
        return {
            self.dims[symbol] for shape in shapes if shape and shape[0] not in tied for symbol in symbols_of(shape[0])
        }

    def table_rows(self) -> dict[str, int]:
        """Inputs whose numbers are looked up in an embedding, and how many rows the smallest such one has."""
        found = {}
        for name, node in zip(self.inputs, self.placeholders, strict=True):
            read = [source(u) for u in node.users if is_call(u, torch.ops.aten.embedding.default) and u.args[1] is node]
            read += [source(u) for u in node.users if is_call(u, torch.ops.aten.index.Tensor) and _remaps(source(u))]
            if read:
                found[name] = min(int(value_of(table).shape[0]) for table in read)
        return found

    def traced_at(self, symbol: sympy.Symbol) -> int:
        """The number that a symbol stood for when the model was traced."""
        sizes = (s for n in self.placeholders for s in n.meta["val"].shape if not isinstance(s, int))
        return next(s.node.hint for s in sizes if s.node.expr == symbol)

    def input_node(self, name: str) -> fx.Node | None:
        """The placeholder of the input called `name`, or None."""
        return dict(zip(self.inputs, self.placeholders, strict=True)).get(name)


def _remaps(table: fx.Node) -> bool:
    """Whether ids are numbered anew with it; any other table may be indexed from its end."""
    return table.op == "get_attr" and str(table.target).startswith(REMAP)


class _Propagate(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode):
        super().__init__(module, garbage_collect_values=False)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = result = super().run_node(n)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.mode.from_tensor(super().get_attr(target, args, kwargs), static_shapes=True)


def place_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor at a dotted name inside a tree of modules, which is grown as needed."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    for held in (module._parameters, module._buffers, module.__dict__):
        held.pop(leaf, None)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def is_call(node: object, *ops: Any) -> TypeGuard[fx.Node]:
    """Whether `node` is a call of one of `ops`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in ops


def source(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that is argument `index` of a call."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def swaps_heads(node: object) -> TypeGuard[fx.Node]:
    """Whether a node transposes the heads and the positions of [B, H, S, D] or [B, S, H, D]."""
    if not is_call(node, torch.ops.aten.transpose.int) or value_of(node).ndim != 4:
        return False
    return {d % 4 for d in node.args[1:3] if isinstance(d, int)} == {1, 2}


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and everything that they are computed from."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


def before_casts(node: Any) -> Any:
    """What a value was before it was cast to other dtypes; the value itself where it was not."""
    while is_call(node, *CASTS):
        node = source(node)
    return node


def map_nodes(function: Callable[[fx.Node], Any], *given: Any) -> Any:
    """`given` (args, kwargs, ..) with every node in it replaced by what `function` makes of it."""
    return fx.map_arg(given, function)


def execute(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a node's op on real or fake values."""
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their names in the op's schema, defaults filled in."""
    schema = cast(torch._ops.OpOverload, node.target)._schema.arguments
    given = dict(zip((a.name for a in schema), node.args)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def sizes_of(value: Tensor) -> list[Size]:
    """A (fake) tensor's sizes as ints and sympy expressions."""
    return [size_of(s) for s in value.shape]


def size_of(size: Any) -> Size:
    """An int, or the sympy expression of a symbolic one."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def symbols_of(size: Size) -> set[sympy.Symbol]:
    """The symbols that a size is made of."""
    return set() if isinstance(size, int) else cast(set[sympy.Symbol], size.free_symbols)


def number_of(size: Size, at: Mapping[sympy.Symbol, int]) -> int:
    """A size as a number, given its symbols' values."""
    if isinstance(size, int):
        return size
    return int(cast(sympy.Integer, size.xreplace({symbol: sympy.Integer(n) for symbol, n in at.items()})))


def size_at(size: int | str, sizes: Mapping[str, int]) -> int:
    """A size of a `TensorSpec` as a number, given those of the named dimensions."""
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]
    expression = cast(Any, sympy.sympify)(size, locals={name: sympy.Symbol(name) for name in sizes})
    return int(expression.subs({sympy.Symbol(name): n for name, n in sizes.items()}))


def value_of(node: fx.Node) -> Any:
    """The fake value that `propagate` left on a node."""
    return node.meta.get("val")


@contextlib.contextmanager
def calls_before(graph: Graph, node: fx.Node) -> Iterator[Callable[..., fx.Node]]:
    """A function that adds calls before `node` and gives each its fake value."""
    mode = graph.fake_mode()

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with graph.fx.inserting_before(node):
            made = graph.fx.call_function(op, args, kwargs)
        values = map_nodes(value_of, made.args, made.kwargs)
        with mode, enable_python_dispatcher(), torch.no_grad():
            made.meta["val"] = op(*values[0], **values[1])
        return made

    yield call


def read_sizes_off(graph: Graph, inputs: Sequence[fx.Node]) -> None:
    """Dynamic sizes are read off the first of `inputs` that has them, wherever they were read before; others are left."""
    places: dict[Size, tuple[fx.Node, int]] = {}
    for node in inputs:
        for d, size in enumerate(sizes_of(value_of(node))):
            if not isinstance(size, int):
                places.setdefault(size, (node, d))
    with calls_before(graph, graph.first_call()) as call:
        made = {size: call(torch.ops.aten.sym_size.int, *place) for size, place in places.items()}
    for node in list(graph.nodes):
        if is_call(node, torch.ops.aten.sym_size.int) and node not in made.values():
            size = size_of(value_of(node))
            if size in made:
                node.replace_all_uses_with(made[size])


def size_arguments(graph: Graph, node: fx.Node, dims: Sequence[int], before: fx.Node) -> list[int | fx.Node]:
    """The sizes of `node` along `dims`: ints where static, `sym_size` calls placed before `before` where dynamic."""
    out: list[int | fx.Node] = []
    for dim in dims:
        size = value_of(node).shape[dim]
        if isinstance(size, int):
            out.append(size)
        else:
            with calls_before(graph, before) as call:
                out.append(call(torch.ops.aten.sym_size.int, node, dim))
    return out
