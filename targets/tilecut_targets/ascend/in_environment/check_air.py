"""Import torch_npu on its stub libraries, and torchair; answer the versions. Runs inside "ascend-air"."""

import importlib.metadata
import json
import os

# With it torch_npu would look for CANN.
os.environ.pop("ASCEND_HOME_PATH", None)

import torch
import torch_npu
import torchair

assert torch_npu and torchair and torch.ops.npu.npu_fused_infer_attention_score.default._schema
names = ("torch", "torch_npu", "numpy", "protobuf")
print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in names}}))
