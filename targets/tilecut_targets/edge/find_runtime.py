"""What the word behind "edge:" names: the runtime that the graph is lowered for; none is onnxruntime on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from tilecut_runtime.errors import ConfigError
from tilecut_targets.target import Target

RUNTIMES = {
    "ort-mobile": "tilecut_targets.edge.ort_mobile:OrtMobileTarget",
    "portable": "tilecut_targets.edge.portable:PortableTarget",
    "openvino": "tilecut_targets.edge.openvino_ir:OpenVinoTarget",
    "executorch": "tilecut_targets.edge.executorch_program:ExecuTorchTarget",
    "qnn": "tilecut_targets.edge.qnn_profile:QnnTarget",
    "coreml": "tilecut_targets.edge.coreml_profile:CoreMlTarget",
}
# Words whose runtime writes the file itself: word -> package. The extra has the word's name.
PACKAGES = {"openvino": "openvino", "executorch": "executorch"}


def find_runtime(chip: str | None = None) -> Target:
    """The target of "edge" or "edge:<word>".

    Raises:
        ConfigError: no such word, or the package that writes its files is not installed.
    """
    if chip is None:
        return _make("tilecut_targets.edge.target:EdgeTarget")
    if chip not in RUNTIMES:
        raise ConfigError(
            "target",
            "the edge target knows no such runtime",
            got=f"edge:{chip}",
            wanted=" or ".join(["edge", *(f"edge:{word}" for word in RUNTIMES)]),
        )
    package = PACKAGES.get(chip)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            "target",
            f"the files of edge:{chip} are written by the package {package}, which is not installed",
            fix=f"pip install 'tilecut[{chip}]'",
        )
    return _make(RUNTIMES[chip])


def _make(where: str) -> Target:
    module, _, name = where.partition(":")
    make: Callable[[], Target] = getattr(importlib.import_module(module), name)
    return make()
