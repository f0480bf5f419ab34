"""Targets by name: each is found, anything else is refused with what there is."""

import subprocess
import sys

import pytest

from checks import ROOT
from tilecut_runtime.errors import ConfigError
from tilecut_targets.ascend.target import AscendTarget
from tilecut_targets.cuda.target import CudaTarget
from tilecut_targets.edge.portable import PortableTarget
from tilecut_targets.edge.qnn_profile import QnnTarget
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.find_target import TARGETS, find_target


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("edge", EdgeTarget()),
        ("edge:", EdgeTarget()),
        ("edge:portable", PortableTarget()),
        ("edge:qnn", QnnTarget()),
        ("cuda", CudaTarget()),
        ("cuda:orin", CudaTarget("orin")),
        ("cuda:sm_80,h100,bf16", CudaTarget("sm_80,h100,bf16")),
        ("ascend", AscendTarget()),
        ("ascend:Ascend910B1", AscendTarget("Ascend910B1")),
    ],
)
def test_a_target_is_found_by_name(name, target):
    assert find_target(name) == target
    assert find_target(str(target)) == target


@pytest.mark.parametrize("name", TARGETS)
def test_the_name_in_the_table_is_the_targets_own(name):
    assert find_target(name).name == str(find_target(name)) == name


def test_a_target_is_returned_as_it_is():
    target = AscendTarget("Ascend910B4")
    assert find_target(target) is target


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("tpu", "unknown target; got 'tpu'; wanted 'edge' or 'cuda' or 'ascend'; `tilecut targets` lists them"),
        ("", "unknown target; got ''"),
        ("Edge", "unknown target"),
        (":edge", "unknown target"),
        (None, "neither a name nor a Target; got NoneType"),
        (EdgeTarget, "neither a name nor a Target"),
        ("edge:x86", "the edge target knows no such runtime; got edge:x86; wanted edge or edge:ort-mobile or"),
        ("cuda:sm90", "knows no such chip or type; got cuda:sm90; wanted a100"),
        ("cuda:fp16,bf16", "two types to compute in; got cuda:fp16,bf16"),
        ("ascend:Ascend310Q3", "Ascend310Q3.*Ascend310P3"),
    ],
)
def test_anything_else_is_refused(wanted, message):
    with pytest.raises(ConfigError, match=message):
        find_target(wanted)


def test_a_target_that_is_not_asked_for_is_not_imported():
    code = (
        "import sys\n"
        "from tilecut_targets.find_target import find_target\n"
        "find_target('cuda')\n"
        "print([m for m in sys.modules if m.startswith(('tilecut_targets.edge', 'tilecut_targets.ascend', 'onnx'))])\n"
    )
    folders = ":".join(str(ROOT / name) for name in ("targets", "passes", "runtime"))
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folders}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
