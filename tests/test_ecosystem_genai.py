"""onnxruntime-genai opens the folder that `Artifact.write_genai` makes, and says what `Session.generate` says.

The package runs in an environment of its own, the folder `genai` in tilecut's cache, which `make ecosystem` makes;
TILECUT_GENAI names another, such as the one of benchmarks/bench_generation.py. Without it these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from generation_models import CONFIGS, GROUPED, VOCAB, calm, decoder, uneven_llama
from tilecut import PruneConfig, compile_pruned, load
from tiny_tokenizer import SIZE, ids_of, saved_with_tokenizer

CACHE = Path(os.environ.get("TILECUT_GENAI", Path.home() / ".cache" / "tilecut" / "genai"))
PYTHON = CACHE / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason="no environment of onnxruntime-genai: run `make ecosystem`"
)

STEPS = 40
PROMPTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (12, 5, 9, 5)]
# One row, rows of one length, rows of unequal ones.
BATCHES = [PROMPTS[:1], [PROMPTS[1], PROMPTS[3][::-1]], PROMPTS]
GENERATE = """
import sys, json, numpy as np, onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
batches, steps, options = map(json.loads, sys.argv[2:5])
pad = json.load(open(sys.argv[1] + "/genai_config.json"))["model"]["pad_token_id"]
found = []
for prompts in batches:
    longest = max(map(len, prompts))
    ids = np.array([row + [pad] * (longest - len(row)) for row in prompts], np.int32)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=longest + steps, **options)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    found.append([generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))])
print(json.dumps(found))
"""
# A token that was generated last is not in genai's cache yet: what is appended goes behind appended tokens.
CONTINUE = """
import sys, json, numpy as np, onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=60, min_length=60)
generator = genai.Generator(model, parameters)
first, second = (np.array(part, np.int32) for part in json.loads(sys.argv[2]))
generator.append_tokens(first)
found = []
for _ in range(2):
    generator.append_tokens(second)
    for _ in range(8):
        generator.generate_next_token()
    found.append(generator.get_sequence(0).tolist())
    generator.rewind_to(len(first))
print(json.dumps(found))
"""
TEXT = """
import sys, json, onnxruntime_genai as genai
tokenizer = genai.Tokenizer(genai.Model(sys.argv[1]))
ids = tokenizer.encode(sys.argv[2])
print(json.dumps([ids.tolist(), tokenizer.decode(ids)]))
"""


def run(code, *arguments):
    env = {**os.environ, "PYTHONPATH": ""}
    command = [PYTHON, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def agrees(artifact, folder, **options):
    """Whether every batch is continued with the session's tokens, ends included."""
    artifact.write_genai(folder)
    session = load(artifact.path, threads=1)
    want = []
    for prompts in BATCHES:
        made = session.generate(prompts, max_new_tokens=STEPS)
        # genai leaves out the id that ends the last row, and has it and padding behind the others.
        want.append([row[:-1] if why == "eos" else row for row, why in zip(made.tokens, made.reasons)])
    assert sum(len(set(row)) > 4 for batch in want for row in batch) >= 2
    got = run(GENERATE, folder, json.dumps(BATCHES), STEPS, json.dumps(options))
    ends = {
        *session.manifest.generation.eos,
        json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"],
    }
    assert all(set(g[len(w) :]) <= ends for pair in zip(got, want) for g, w in zip(*pair))
    return [[g[: len(w)] for g, w in zip(*pair)] for pair in zip(got, want)] == want


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts_are_the_sessions(name, tmp_path):
    artifact = compile_pruned(
        decoder(name), "edge", config=None, output=tmp_path / "made", generate=True, measure=False
    )
    assert agrees(artifact, tmp_path / "genai")


def test_caches_that_past_and_present_do_not_share(tmp_path):
    artifact = compile_pruned(
        decoder("llama"), "edge", config=None, output=tmp_path / "made", generate=True, measure=False
    )
    assert agrees(artifact, tmp_path / "genai", past_present_share_buffer=False)


@pytest.mark.parametrize("how", ["int4", "int8", "fp16"])
def test_quantized(how, tmp_path):
    model = calm(decoder("llama"))
    ids = torch.randint(0, VOCAB, (16, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    config = PruneConfig(sparsity=0.0, at={"sequence": 16}, quantize=how, reconstruct=False, cache="")
    artifact = compile_pruned(
        model, "edge", calibration=batches, config=config, output=tmp_path / "made", generate=True, measure=False
    )
    assert agrees(artifact, tmp_path / "genai")


@pytest.mark.filterwarnings("ignore:few calibration data")
def test_a_pruned_model_whose_layers_have_different_heads(tmp_path):
    artifact = uneven_llama(tmp_path / "made")
    assert [spec.shape[1] for spec in artifact.manifest.inputs if spec.name.endswith(".key")] == [1, 2]
    assert agrees(artifact, tmp_path / "genai")


def test_a_text_goes_on_behind_its_cache(tmp_path):
    artifact = compile_pruned(
        decoder("gpt2"), "edge", config=None, output=tmp_path / "made", generate=True, measure=False
    )
    folder = artifact.write_genai(tmp_path / "genai")
    whole = [*PROMPTS[0], *PROMPTS[1]]
    want = load(artifact.path, threads=1).generate(whole, max_new_tokens=8, eos=()).tokens[0]
    # The second time after going back.
    assert run(CONTINUE, folder, json.dumps(PROMPTS[:2])) == [[*whole, *want]] * 2


def test_its_tokenizer_opens_the_folder(tmp_path):
    sizes = {**GROUPED, "vocab_size": SIZE}
    model = saved_with_tokenizer(tmp_path / "hf", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    artifact = compile_pruned(model, "edge", config=None, output=tmp_path / "made", generate=True, measure=False)
    folder = artifact.write_genai(tmp_path / "genai")
    assert run(TEXT, folder, "hello there") == [ids_of("hello there"), "hello there"]
