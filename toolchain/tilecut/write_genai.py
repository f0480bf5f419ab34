"""Write an artifact that generates as a folder of onnxruntime-genai: `model.onnx`, `genai_config.json`, tokenizer files.

The folder is all that `onnxruntime_genai.Model` needs. The graph is the artifact's, quantized or not, behind other inputs
(`count_by_mask.py`). Layers may differ in KV groups and head widths: genai reads them off the model's own inputs, and the
counts in its config are those of the widest.

Specification: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tilecut.copy_companions import COMPANIONS
from tilecut.write_artifact import artifact_folder
from tilecut_runtime.cache_layout import CacheLayout, past_name, present_name
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, TensorSpec, read_json
from tilecut_targets.edge.count_by_mask import ATTENTION, LOGITS, MASK, TOKENS, count_by_mask

MODEL, CONFIG = "model.onnx", "genai_config.json"
PARTS = ("key", "value")
# What a folder of the original model holds of special ids; the later one has the last word.
SPECIAL = ("config.json", "generation_config.json")


def write_genai(artifact: Path, manifest: Manifest, output: str | Path) -> Path:
    """Write the folder whole or not at all.

    Args:
        artifact: the artifact's folder, whose manifest this is.
        output: a folder that is empty, or not there.

    Raises:
        ArtifactError: the artifact has no cache, an encoder, or a cache that genai's format has no words for; a file of it
            was altered; the output folder holds something.
    """
    layout = manifest.generation
    if layout is None:
        raise ArtifactError(
            str(artifact),
            "was compiled without a cache, which onnxruntime-genai needs",
            fix="compile it with generate=True",
        )
    if layout.stateful:
        raise ArtifactError(
            str(artifact), "onnxruntime-genai reads ONNX files", got=f"an artifact for {manifest.target}", wanted="one for edge"
        )
    if manifest.encoder is not None:
        raise ArtifactError(
            str(artifact),
            "onnxruntime-genai's folder is written for models that are one decoder",
            got="a decoder with an encoder",
            wanted="a causal language model",
        )
    _check_caches(artifact, manifest, layout)
    entry = manifest.file_of(artifact, "model")
    companions = [name for name in COMPANIONS if name in manifest.files]
    read = [name for name in (entry, f"{entry}.data") if name in manifest.files]
    manifest.check_files(artifact, [*read, *companions, *(name for name in SPECIAL if name in manifest.files)])
    with artifact_folder(output, _refuse) as folder:
        model = ir.load(artifact / entry)
        count_by_mask(model, layout)
        ir.save(model, folder / MODEL, external_data=f"{MODEL}.data" if len(read) > 1 else None)
        config = _config(artifact, manifest, layout, _most_heads(model))
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for name in companions:
            shutil.copyfile(artifact / name, folder / name)
    return Path(output)


def _refuse(folder: Path) -> None:
    """Refuse a folder that holds something."""
    raise ArtifactError(
        str(folder), "the output folder exists and is not empty", fix="name another folder, or empty it yourself"
    )


def _check_caches(artifact: Path, manifest: Manifest, layout: CacheLayout) -> None:
    """Refuse caches that one pattern of names, counted from 0, and one shape a layer do not describe."""
    count = len(layout.states) // len(PARTS)
    wanted = {past_name(i, part): present_name(i, part) for i in range(count) for part in PARTS}
    if dict(layout.states) != wanted:
        odd = next((name for name in layout.states if layout.states[name] != wanted.get(name)), "none")
        raise ArtifactError(
            str(artifact),
            "onnxruntime-genai numbers caches by one pattern",
            got=f"{odd} among {len(layout.states)} caches",
            wanted="past_key_values.<i>.key and .value from 0 on",
            fix="compile the model again",
        )
    specs = {spec.name: spec for spec in manifest.inputs}
    for i in range(count):
        key, value = (specs[past_name(i, part)] for part in PARTS)
        first = specs[past_name(0, "key")]
        if key.shape != value.shape or {key.dtype, value.dtype} != {first.dtype}:
            raise ArtifactError(
                str(artifact),
                f"onnxruntime-genai has one shape for a layer's keys and values, and one dtype; layer {i} has others",
                got=f"{key}; {value}",
                wanted=f"equal shapes of {first.dtype}",
            )


def _most_heads(model: ir.Model) -> int:
    """Queries of the attention that has most."""
    return max(node.attributes["num_heads"].as_int() for node in model.graph if node.op_type == ATTENTION)


def _config(artifact: Path, manifest: Manifest, layout: CacheLayout, heads: int) -> dict[str, Any]:
    """What `genai_config.json` holds, with greedy search unless the caller asks for another."""
    specs = {spec.name: spec for spec in manifest.inputs}
    caches = [_fixed(specs[name]) for name in layout.states]
    vocabulary = next(int(spec.shape[-1]) for spec in manifest.outputs if spec.name == layout.logits)
    # genai reads the logits of these ids; a model that has no such word never says it.
    eos = [one for one in layout.eos if one < vocabulary]
    special = _special(artifact, manifest, vocabulary)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": special.get("bos_token_id", 0),
            "eos_token_id": eos,
            "pad_token_id": special.get("pad_token_id", eos[0] if eos else 0),
            "context_length": layout.max_length,
            "vocab_size": vocabulary,
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": max(width for _, width in caches),
                "num_attention_heads": heads,
                "num_key_value_heads": max(groups for groups, _ in caches),
                "num_hidden_layers": len(caches) // len(PARTS),
                "inputs": {
                    "input_ids": TOKENS,
                    "attention_mask": MASK,
                    **{f"past_{part}_names": f"past_key_values.%d.{part}" for part in PARTS},
                },
                "outputs": {
                    "logits": LOGITS,
                    **{f"present_{part}_names": f"present.%d.{part}" for part in PARTS},
                },
            },
        },
        "search": {"do_sample": False, "max_length": layout.max_length, "past_present_share_buffer": True},
    }


def _fixed(spec: TensorSpec) -> tuple[int, int]:
    """KV groups and width of a cache."""
    return int(spec.shape[1]), int(spec.shape[3])


def _special(artifact: Path, manifest: Manifest, vocabulary: int) -> dict[str, int]:
    """The ids that begin and pad a text, where the model's files name some that it knows."""
    found: dict[str, int] = {}
    for name in SPECIAL:
        held = read_json(artifact / name) if name in manifest.files else {}
        for key in ("bos_token_id", "pad_token_id"):
            one = held.get(key) if isinstance(held, dict) else None
            if isinstance(one, int) and 0 <= one < vocabulary:
                found[key] = one
    return found
