"""Computing in 16 bits: every architecture stays close to its float32 self, and every product reads 16-bit numbers."""

import pytest
import torch
from torch import nn

from checks import compiled, emit, encoder_graph
from test_models import made
from tilecut import PruneConfig
from tilecut.make_cases import make_case, make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import is_call, source, value_of
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import VerificationError
from tilecut_runtime.session import load
from tilecut_runtime.torch_program import ready_program
from tilecut_targets.compute_in import ATTENTION, PRODUCTS, ComputeIn
from tilecut_targets.cuda.target import TOLERANCE, CudaTarget
from tilecut_targets.export_program import export_program
from zoo import ZOO

aten = torch.ops.aten
QUICK = ("bert", "gpt2", "llama_tied", "mixtral", "deberta_v2", "vit", "hand_gpt")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_stays_close(name):
    model, example = made(name)
    graph = capture(model, example)
    run_passes(graph, [FuseAttention()])
    given = make_inputs(graph, 2, 9, seed=0)
    case = make_case(given, graph.run(given))
    for dtype in (torch.float16, torch.bfloat16):
        half = graph.copy()
        (record,) = run_passes(half, [ComputeIn(dtype)])
        assert record.rewrites > 0
        assert half.output_specs() == graph.output_specs()
        out = half.run(given)
        assert case.error({k: v.numpy() for k, v in out.items()}) < TOLERANCE[str(dtype).removeprefix("torch.")]
        export_program(half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_read_16_bits_and_norms_float32(dtype):
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention(), ComputeIn(dtype)])
    seen = {"products": 0, "attention": 0, "norms": 0}
    for node in graph.nodes:
        op = getattr(node.target, "overloadpacket", None)
        read = {value_of(n).dtype for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)}
        if op in PRODUCTS:
            assert read == {dtype}
            seen["products"] += 1
        elif op in ATTENTION:
            assert {value_of(n).dtype for n in node.args[:3]} == {dtype}
            seen["attention"] += 1
        elif is_call(node, aten.layer_norm.default):
            assert read == {torch.float32}
            seen["norms"] += 1
    assert seen == {"products": 12, "attention": 2, "norms": 4}


def test_what_a_choice_is_made_by_is_not_rounded():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.up = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x) * self.router(x).softmax(-1).topk(2).values.sum(-1, keepdim=True)

    graph = capture(Router(), {"x": torch.randn(3, 8)})
    run_passes(graph, [ComputeIn(torch.bfloat16)])
    types = {source(n, 1).target: value_of(n).dtype for n in graph.nodes if is_call(n, aten.linear.default)}
    router = next(value for name, value in types.items() if "router" in str(name))
    assert router == torch.float32 and torch.bfloat16 in types.values()


def test_an_artifact_holds_its_weights_once_and_reads_them_in_16_bits(tmp_path):
    target = CudaTarget("orin,bf16")
    emitted = emit(target, encoder_graph(), tmp_path / "artifact")
    program = ready_program(emitted.folder, emitted.manifest, "model", "cpu")
    types = {name: tensor.dtype for name, tensor in program.state_dict.items()}
    assert types["q.0.weight"] == types["down.1.weight"] == torch.bfloat16
    assert types["norms.0.weight"] == types["embed.weight"] == torch.float32
    rungs = {r.name: r for r in target.verify(emitted.folder, emitted.manifest, emitted.cases)}
    equal = rungs["artifact equals pruned model"]
    assert equal.status == "passed" and equal.limit == 5e-2
    assert equal.figure is not None and 1e-4 < equal.figure < 2e-2
    kernels = emitted.written.facts["kernels"]
    assert {k["dtype"] for k in kernels} == {"bf16"} and {k["arch"] for k in kernels} == {"sm_87"}
    session = load(emitted.folder, device="cpu")
    assert session.how == "exported program"
    got = session.run(emitted.cases[0].inputs)
    assert all(v.dtype.name == "float32" for v in got.values())


# So many that random inputs miss one.
WORDS = 300_000


class Loud(nn.Module):
    """The last word is so loud that what is made of it is no float16."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)
        with torch.no_grad():
            self.embed.weight[-1] *= 3e5

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(self.embed(input_ids)).relu()))


def test_what_only_real_data_show_is_shown(tmp_path):
    config = PruneConfig(sparsity=0.3, at={"sequence": 8}, method="magnitude", reconstruct=False)
    batches = [{"input_ids": torch.randint(49, (4, 8))} for _ in range(10)]
    given = {"model": Loud().eval(), "example_inputs": {"input_ids": torch.zeros(2, 8, dtype=torch.long)}}
    given["config"] = config
    quiet = compiled("cuda:orin,fp16", tmp_path / "quiet", **given, calibration=batches)
    assert {r.name: r.status for r in quiet.manifest.verification}["16 bits on real data"] == "passed"
    loud = [{"input_ids": torch.full((4, 8), WORDS - 1)} for _ in range(10)]
    with pytest.raises(VerificationError, match="16 bits on real data.*got inf.*compute in bf16 or float32"):
        compiled("cuda:orin,fp16", tmp_path / "loud", **given, calibration=loud)
    assert not (tmp_path / "loud").exists()


def test_an_op_without_16_bits_reads_float32():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(self.up(x)).abs() + torch.linalg.vector_norm(self.up(x), dim=-1, keepdim=True)

    graph = capture(Mixed(), {"x": torch.randn(3, 8)})
    given = {"x": torch.randn(3, 8)}
    want = graph.run(given)
    run_passes(graph, [ComputeIn(torch.float16)])
    assert torch.allclose(graph.run(given)["output"], want["output"], atol=5e-2)
