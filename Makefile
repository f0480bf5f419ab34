# Two commands do everything on a machine with Python 3.11 and make: `make demo` and `make test`.
# Each makes its environment in .venv when it is not there yet, or when pyproject.toml or constraints.txt changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENV := .venv
PY := $(ENV)/bin/python
# Nothing is loaded from a model hub; tests run side by side, one thread each.
export HF_HUB_OFFLINE := 1
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

.PHONY: demo test test-all test-wheel toolchain ecosystem lint types bench bench-edge bench-pruning bench-recipes bench-latency bench-language bench-memory bench-attention bench-varlen bench-run-many bench-generation bench-huge-pages models clean

demo: $(ENV)/.demo  ## prune the real model for the edge target and show what came of it
	$(PY) benchmarks/demo.py

test: lint types  ## what every change must pass
	$(PYTEST) -m "not slow and not gpu"

test-all: lint types  ## with the long tests, then all of them again against the built wheel
	$(PYTEST) -m "not gpu"
	$(MAKE) test-wheel

# The wheel's packages come first on the path, in a folder with a user's own `runtime.py` and `passes/`.
test-wheel: $(ENV)/.dev
	rm -rf build/wheel && mkdir -p build/wheel/user/passes
	$(PY) -m build --wheel --no-isolation --outdir build/wheel . > build/wheel/build.log
	$(PY) -m pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cp -r tests benchmarks examples README.md build/wheel/user/
	echo 'raise ImportError("the runtime.py of a user was imported")' > build/wheel/user/runtime.py
	echo 'raise ImportError("the passes/ of a user was imported")' > build/wheel/user/passes/__init__.py
	cd build/wheel/user && TILECUT_FROM=$(CURDIR)/build/wheel/site PYTHONPATH=$(CURDIR)/build/wheel/site:. OMP_NUM_THREADS=1 \
		$(CURDIR)/$(PY) -m pytest -n auto --dist loadfile -m "not slow and not gpu" -c $(CURDIR)/pyproject.toml \
		--rootdir . -o pythonpath='tests benchmarks' tests

# Tests marked `toolchain` run once it is there, and are skipped without it.
toolchain: $(ENV)/.dev  ## the private environments of the ascend target, 1 GB and more in ~/.cache/tilecut; once
	$(PY) -m tilecut toolchain install ascend

# tests/test_ecosystem.py and test_ecosystem_genai.py run once they are there, and are skipped without them.
ecosystem:  ## environments of optimum, optimum-intel and sentence-transformers, which want older transformers, and of onnxruntime-genai; once
	$(PYTHON) -m venv $(HOME)/.cache/tilecut/ecosystem
	$(HOME)/.cache/tilecut/ecosystem/bin/python -m pip install -q "torch==2.13.0" "optimum-onnx[onnxruntime]==0.1.0" \
		"optimum-intel==1.27.0" "openvino==2026.4.1" "sentence-transformers==5.7.0" "transformers==4.57.6"
	$(PYTHON) -m venv $(HOME)/.cache/tilecut/genai
	$(HOME)/.cache/tilecut/genai/bin/python -m pip install -q "onnxruntime-genai==0.18.0" "onnxruntime==1.32.0"

lint: $(ENV)/.dev
	$(PY) -m ruff check .

types: $(ENV)/.dev
	$(PY) -m basedpyright --pythonpath $(PY)

bench: $(ENV)/.demo  ## the figures of benchmarks/RESULTS.md
	$(PY) benchmarks/bench_minilm_edge.py

bench-pruning: $(ENV)/.bench  ## accuracy at four budgets, beside Kwon et al. and Torch-Pruning; three seeds
	$(PY) benchmarks/bench_pruning.py

bench-edge: $(ENV)/.dev  ## the edge target beside other exporters, optimizers and runtimes
	$(PY) benchmarks/bench_edge.py

bench-recipes: $(ENV)/.bench  ## half the parameters by four recipes: speed and accuracy
	$(PY) benchmarks/bench_recipes.py

bench-latency: $(ENV)/.bench  ## latency budgets, asked for and measured
	$(PY) benchmarks/bench_latency_budget.py

bench-language: $(ENV)/.bench  ## perplexity of a small GPT and a small LLaMA, cut and recovered; trains them first
	$(PY) benchmarks/bench_language_models.py

bench-memory: $(ENV)/.bench  ## a checkpoint larger than the memory it is given
	$(PY) benchmarks/bench_larger_than_memory.py

bench-attention: $(ENV)/.bench  ## the attention kernels beside those of others; on a GPU, or small on the CPU
	$(PY) benchmarks/attention.py

bench-varlen: $(ENV)/.bench  ## training and running on texts of different lengths; on a GPU, or small on the CPU
	$(PY) benchmarks/varlen.py

bench-run-many: $(ENV)/.bench  ## Session.run_many beside one padded batch; on the CPU
	$(PY) benchmarks/bench_run_many.py

bench-generation: $(ENV)/.bench  ## decoding beside onnxruntime-genai, and perplexity through a cache; on the CPU
	$(PY) benchmarks/bench_generation.py --genai build/genai
	$(PY) benchmarks/bench_generated_text.py

bench-huge-pages: $(ENV)/.bench  ## one artifact with and without huge pages; on Linux
	$(PY) benchmarks/bench_huge_pages.py

models: $(ENV)/.dev  ## README's table of models
	PYTHONPATH=tests $(PY) tests/write_models_table.py

clean:
	rm -rf $(ENV) build dist demo-output

$(ENV)/.demo: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(ENV)/.bench: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

$(ENV)/.dev: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(ENV)/.demo

$(PY):
	$(PYTHON) -m venv $(ENV)
