"""Quantize an ONNX file: the last step, after pruning, refitting, fusing and lowering.

Before: a file in float32. After, by the word of `QUANTIZATIONS`:
    int8            weights int8 a column; activations uint8, their range taken in the run, once for all that read them:
                    DynamicQuantizeLinear -> MatMulIntegerToFloat, QAttention
    int8-static     the same with ranges from calibration, as QuantizeLinear / DequantizeLinear pairs around MatMul (QDQ),
                    which other runtimes read too; attention is its projection, Split and MultiHeadAttention
    int4, int4:128  weights of 4 bits with a scale and a zero point a block of 32 or 128 rows: MatMulNBits
    fp16            weights stored in 16 bits and cast when the file is loaded; the arithmetic stays float32
Embedding tables of a megabyte and more become int8 a row; one that is also the weight of a product is stored once. Biases,
norms, softmax, masks and the products of attention stay float32. Left alone, with the reason in the record: weights too
narrow to gain, convolutions, and with int8-static products that calibration shows to lose too much.
Specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tilecut_passes.calibration import Batch
from tilecut_targets.edge.activation_ranges import Ranges, measure_ranges
from tilecut_targets.edge.onnx_products import Product, Tensors, find_products, find_tables
from tilecut_targets.edge.round_weights import Columns, round_blocks, round_columns
from tilecut_targets.write_onnx import EXTERNAL_DATA_BYTES

# How far the outputs of a quantized model may be from those of the model that it was made of: |difference| / |output|.
QUANTIZATIONS = {"int8": 0.3, "int8-static": 0.3, "int4": 0.5, "int4:128": 0.5, "fp16": 1e-2}
CALIBRATED = ("int8-static",)
# A product with fewer rows or columns costs more to quantize than its multiplications.
NARROW = 16
# A smaller table saves less than the nodes cost that read it.
TABLE_BYTES = 1 << 20
# The largest relative error of one product's output on calibration data: above it, it stays float32.
PRODUCT_ERROR = 0.25
# MatMulNBits: 4 rounds activations to int8 in blocks, which is what makes it faster than float32 on a CPU.
ACCURACY_LEVEL = 4
MICROSOFT = "com.microsoft"


def quantize_onnx(path: Path, how: str, batches: Sequence[Batch] = (), runtime_rounds: bool = False) -> dict[str, Any]:
    """Quantize the file at `path` in place, its external data with it; returns the record for the report.

    Args:
        how: a word of `QUANTIZATIONS`.
        batches: inputs of the model, for the ranges of "int8-static".
        runtime_rounds: the runtime rounds activations itself: "int8" is weights behind DequantizeLinear.
    """
    before = _bytes(path)
    model = onnx.load(str(path))
    rewrite = _Rewrite(model, runtime_rounds)
    if how == "fp16":
        rewrite.halve()
    else:
        ranges = None
        if how == "int8-static":
            products = [p for p in rewrite.products.values() if rewrite.stays(p) is None]
            ranges = measure_ranges(path, {p.x for p in products}, batches)
        rewrite.quantize(how, ranges)
    rewrite.finish()
    _save(model, path)
    return {"how": how, **rewrite.record(), "bytes": {"before": before, "after": _bytes(path)}}


class _Rewrite:
    """One file while it is rewritten: new nodes and tensors, and what was counted."""

    def __init__(self, model: onnx.ModelProto, runtime_rounds: bool = False):
        self.model, self.tensors, self.runtime_rounds = model, Tensors(model), runtime_rounds
        self.products = {id(p.nodes[0]): p for p in find_products(self.tensors)}
        self.tables = find_tables(self.tensors)
        self.tied = self._find_tied()
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto] = {}
        self.columns: dict[str, Columns] = {}
        self.counts: dict[str, int] = {}
        self.kept: dict[str, str] = {}
        self.placed: set[str] = set()

    def _find_tied(self) -> dict[str, str]:
        """Weights that are a table's transpose, with the table; the exporter writes them out twice."""
        found = {}
        for product in self.products.values():
            weight = self.tensors.by_name[product.weight]
            for table in self.tables:
                if product.weight == table:
                    if product.transposed:
                        found[table] = table
                elif (
                    not product.transposed
                    and list(weight.dims) == list(self.tensors.by_name[table].dims)[::-1]
                    and np.array_equal(self.tensors.array(product.weight), self.tensors.array(table).T)
                ):
                    found[product.weight] = table
        return found

    def stays(self, product: Product) -> str | None:
        """Why a product stays as it is, or None."""
        sizes = self.tensors.by_name[product.weight].dims
        return "too narrow to gain" if min(sizes) < NARROW else None

    def quantize(self, how: str, ranges: Ranges | None) -> None:
        """Rewrite products and tables to integers."""
        gathers = {id(n): table for table, nodes in self.tables.items() if self._shrinks(table) for n in nodes}
        self.counts |= {"products": 0, "attentions": 0, "tables": len(set(gathers.values()))}
        absorbed: set[int] = set()
        for node in self.model.graph.node:
            if id(node) in absorbed:
                continue
            product = self.products.get(id(node))
            if id(node) in gathers:
                self._gather(node, gathers[id(node)])
            elif product is None or not self._product(product, how, ranges):
                self.nodes.append(node)
            else:
                absorbed |= {id(n) for n in product.nodes}

    def _shrinks(self, table: str) -> bool:
        size = int(np.prod(self.tensors.by_name[table].dims)) * 4
        return size >= TABLE_BYTES or any(
            self.tied.get(p.weight) == table and self.stays(p) is None for p in self.products.values()
        )

    def _product(self, product: Product, how: str, ranges: Ranges | None) -> bool:
        """Write a product's quantized form; False where it stays."""
        reason = self.stays(product)
        if reason is None and ranges is not None:
            reason = self._loses(product, ranges)
        if reason is not None:
            self.kept[product.weight] = reason
            return False
        in_the_run = how == "int8" or (how.startswith("int4") and product.weight in self.tied)
        if in_the_run and not self.runtime_rounds:
            self._dynamic(product)
        elif in_the_run or ranges is not None:
            self._restored(product, ranges)
        else:
            self._weight_only(product, int(how.partition(":")[2] or 32))
        self.counts["attentions" if product.attention is not None else "products"] += 1
        return True

    def _loses(self, product: Product, ranges: Ranges) -> str | None:
        """Why calibration says that a product should stay."""
        if product.x not in ranges:
            return "no calibration batch reaches it"
        held, rounded = self._matrix(product), self._columns(product).restored()
        x = ranges[product.x]
        want, got = x.rows @ held, x.rounded(x.rows) @ rounded
        error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))
        return f"its output would be off by {error:.2f} on calibration data" if error > PRODUCT_ERROR else None

    def _matrix(self, product: Product) -> np.ndarray:
        held = self.tensors.array(product.weight)
        return held.T if product.transposed else held

    def _columns(self, product: Product) -> Columns:
        """The rounded weight; a tied one is its table's."""
        key = f"{self.tied.get(product.weight, product.weight)}{'.T' if product.transposed else ''}"
        if key not in self.columns:
            if product.weight in self.tied:
                self.columns[key] = self._rows(self.tied[product.weight])
            else:
                self.columns[key] = round_columns(self._matrix(product))
        return self.columns[key]

    def _rows(self, table: str) -> Columns:
        """A table's rows as the columns of its transpose, so that a product can share them."""
        key = f"{table} as rows"
        if key not in self.columns:
            self.columns[key] = round_columns(self.tensors.array(table).T)
        return self.columns[key]

    def _integers(self, product: Product) -> tuple[str, str]:
        """The names of the weight int8 [K, N] and its scale [N]."""
        rounded = self._columns(product)
        if product.weight in self.tied:
            values, scale = self._table(self.tied[product.weight])
            return self._once(f"{values}.transposed", "Transpose", [values], perm=[1, 0]), scale
        name = f"{product.weight}{'.T' if product.transposed else ''}"
        return self.tensor(f"{name}.int8", rounded.values), self.tensor(f"{name}.scale", rounded.scale)

    def _dynamic(self, p: Product) -> None:
        weight, scale = self._integers(p)
        x = self._quantized_at_run_time(p.x)
        if p.attention is not None:
            mask = p.attention.input[3] if len(p.attention.input) > 3 else ""
            inputs = [x[0], weight, p.bias or "", x[1], scale, mask, x[2]]
            node = helper.make_node("QAttention", inputs, [p.output], domain=MICROSOFT)
            node.attribute.extend(p.attention.attribute)
            self.nodes.append(node)
            return
        # With the bias in the product a gelu is cheaper alone than as BiasGelu.
        out = f"{p.output}.linear" if p.gelu else p.output
        inputs = [x[0], weight, x[1], scale, x[2], *(["", p.bias] if p.bias else [])]
        self.add("MatMulIntegerToFloat", inputs, [out], MICROSOFT)
        if p.gelu:
            self.add("Gelu", [out], [p.output])

    def _quantized_at_run_time(self, x: str) -> list[str]:
        names = [f"{x}.uint8", f"{x}.scale", f"{x}.zero"]
        if names[0] not in self.placed:
            self.add("DynamicQuantizeLinear", [x], names)
            self.placed.add(names[0])
        return names

    def _restored(self, p: Product, ranges: Ranges | None) -> None:
        """A product of weights restored from integers, and of activations rounded to `ranges` if there are any."""
        weight, scale = self._integers(p)
        zero = self.tensor(f"{scale}.zero", np.zeros(self._columns(p).scale.shape, np.int8))
        restored = self._once(f"{weight}.restored", "DequantizeLinear", [weight, scale, zero], axis=1)
        x = p.x if ranges is None else self._rounded(p.x, ranges)
        self._linear(p, lambda out: self.add("MatMul", [x, restored], [out]))
        # Of MatMul and Add onnxruntime makes a Gemm, which then runs in float32; it leaves Sum alone.
        for reader in self.tensors.readers[p.output]:
            if reader.op_type == "Add":
                reader.op_type = "Sum"

    def _rounded(self, x: str, ranges: Ranges) -> str:
        held = ranges[x]
        step, middle = self.tensor(f"{x}.scale", held.scale), self.tensor(f"{x}.zero", held.zero)
        rounded = self._once(f"{x}.uint8", "QuantizeLinear", [x, step, middle])
        return self._once(f"{x}.rounded", "DequantizeLinear", [rounded, step, middle])

    def _weight_only(self, p: Product, block: int) -> None:
        name = f"{p.weight}{'.T' if p.transposed else ''}.int4"
        if name not in self.made:
            blocks = round_blocks(self._matrix(p), block)
            self.tensor(name, blocks.packed)
            self.tensor(f"{name}.scale", blocks.scale.reshape(-1))
            self.tensor(f"{name}.zero", blocks.zero.reshape(-1))
        rows, columns = self._matrix(p).shape
        inputs = [p.x, name, f"{name}.scale", f"{name}.zero"]
        sizes = {"K": rows, "N": columns, "bits": 4, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
        self._linear(p, lambda out: self.add("MatMulNBits", inputs, [out], MICROSOFT, **sizes))

    def _linear(self, p: Product, multiply: Callable[[str], None]) -> None:
        """The product by `multiply(output)`, and around it bias, gelu or attention in float32."""
        if p.gelu:
            multiply(f"{p.output}.linear")
            self.add("BiasGelu", [f"{p.output}.linear", p.bias or ""], [p.output], MICROSOFT)
            return
        out = f"{p.output}.qkv" if p.attention is not None else p.output
        if p.bias is None:
            multiply(out)
        else:
            multiply(f"{p.output}.linear")
            # No Add, for the reason that is given in `_restored`.
            self.add("Sum", [f"{p.output}.linear", p.bias], [out])
        if p.attention is not None:
            parts = [f"{p.output}.{part}" for part in "qkv"]
            self.add("Split", [out], parts, axis=-1, num_outputs=3)
            mask = ["", p.attention.input[3]] if len(p.attention.input) > 3 and p.attention.input[3] else []
            node = helper.make_node("MultiHeadAttention", [*parts, *mask], [p.output], domain=MICROSOFT)
            node.attribute.extend(p.attention.attribute)
            self.nodes.append(node)

    def _table(self, table: str) -> tuple[str, str]:
        rounded = self._rows(table)
        return self.tensor(f"{table}.rows", rounded.values.T), self.tensor(f"{table}.rows.scale", rounded.scale)

    def _gather(self, node: NodeProto, table: str) -> None:
        values, scale = self._table(table)
        ids, out = node.input[1], node.output[0]
        column = self._once(f"{scale}.column", "Unsqueeze", [scale, self.tensor("quantize.last", np.array([-1]))])
        self.add("Gather", [values, ids], [f"{out}.row"], axis=0)
        self.add("Gather", [column, ids], [f"{out}.row.scale"], axis=0)
        self.add("Cast", [f"{out}.row"], [f"{out}.row.float"], to=TensorProto.FLOAT)
        self.add("Mul", [f"{out}.row.float", f"{out}.row.scale"], [out])

    def halve(self) -> None:
        """Store what has rank 2 or more in 16 bits, with a Cast that is folded when the file is loaded."""
        for name, tensor in self.tensors.by_name.items():
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or 0 in tensor.dims:
                continue
            values = self.tensors.array(name)
            if np.abs(values).max() > np.finfo(np.float16).max:
                self.kept[name] = "its numbers exceed 65504"
                continue
            self.add("Cast", [self.tensor(f"{name}.fp16", values.astype(np.float16))], [name], to=TensorProto.FLOAT)
            self.counts["weights"] = self.counts.get("weights", 0) + 1
        self.nodes += self.model.graph.node

    def add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> None:
        """Append a node."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain or None, **attributes))

    def _once(self, out: str, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node that several products share: before the first of them."""
        if out not in self.placed:
            self.add(op, inputs, [out], **attributes)
            self.placed.add(out)
        return out

    def tensor(self, name: str, values: np.ndarray) -> str:
        """An initializer, made once."""
        if name not in self.made:
            self.made[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def finish(self) -> None:
        """Put the new nodes and tensors in, without what nothing reads any more."""
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(_alive(self.nodes, {o.name for o in graph.output}))
        read = {name for node in graph.node for name in _reads(node)} | {o.name for o in graph.output}
        made = {name for node in graph.node for name in node.output}
        held = [t for t in graph.initializer if t.name in read and t.name not in made]
        del graph.initializer[:]
        graph.initializer.extend([*held, *(t for name, t in self.made.items() if name in read)])
        known = {v.name for v in graph.value_info} & {name for node in graph.node for name in node.output}
        typed = [v for v in graph.value_info if v.name in known]
        del graph.value_info[:]
        graph.value_info.extend(typed)
        domains = {o.domain for o in self.model.opset_import}
        if MICROSOFT not in domains:
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def record(self) -> dict[str, Any]:
        """What was quantized, and what stayed in float32 and why."""
        graph = self.model.graph
        readers = {name: node.op_type for node in graph.node for name in node.input}
        kept = [
            {
                "what": f"{readers[t.name]} {t.name}",
                "shape": list(t.dims),
                "why": self.kept.get(t.name) or _why(readers[t.name], t),
            }
            for t in graph.initializer
            if t.data_type == TensorProto.FLOAT and len(t.dims) >= 2 and t.name in readers and t.name not in self.made
        ]
        return {**self.counts, "kept": kept}


def _why(op: str, tensor: TensorProto) -> str:
    if op == "Gather" and len(tensor.dims) == 2:
        return "a table of less than a megabyte"
    return f"{op} of rank {len(tensor.dims)} has no quantized form here"


def _alive(nodes: Sequence[NodeProto], wanted: set[str]) -> list[NodeProto]:
    """The nodes that lead to the outputs."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            kept.append(node)
    return kept[::-1]


def _reads(node: NodeProto) -> set[str]:
    """What a node reads, its sub-graphs included."""
    names = {name for name in node.input if name}
    for a in node.attribute:
        for graph in (a.g, *a.graphs):
            for inner in graph.node:
                names |= _reads(inner)
            names |= {o.name for o in graph.output}
    return names


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model; weights go beside it where they do not fit into one file."""
    data = path.parent / f"{path.name}.data"
    data.unlink(missing_ok=True)
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    if size > EXTERNAL_DATA_BYTES:
        onnx.save_model(model, str(path), save_as_external_data=True, location=data.name)
    else:
        onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path))
