# Everything runs in .venv, made from nothing but Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One BLAS thread for each worker: sums in one order, and workers that do not wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
# Workers take contiguous halves of the files, so that a module's fixtures are made once.
PARALLEL := -n auto --dist worksteal

# Of `make torture`: minutes, and the order of its points.
BUDGET ?= 5
SEED ?= 0

.PHONY: demo test test-slow test-all test-gpu test-pages test-versions test-matrix torture lint \
	docs dev clean

demo: $(STAMP)  ## train, merge and verify a tiny checkpoint
	$(BIN)/qcore demo

test: $(STAMP)  ## every unit, one whole run per verb; timing tests alone at the end
	$(PYTEST) $(PARALLEL) -m "not gpu and not slow and not timing"
	$(PYTEST) -n 0 -m "timing and not gpu and not slow"

test-slow: $(STAMP)  ## the other whole runs, whole sweeps, more shapes of each kernel
	$(PYTEST) $(PARALLEL) -m "slow and not gpu and not timing"
	$(PYTEST) -n 0 -m "timing and slow and not gpu"

test-all: test test-slow  ## all tests that need no GPU

test-gpu: $(STAMP)  ## all tests that need a CUDA device
	$(BIN)/pytest -m gpu

test-pages: $(STAMP)  ## the page of `qcore data show --html` in headless Chromium, which is installed
	$(BIN)/pip install -q --disable-pip-version-check playwright
	command -v chromium >/dev/null || $(BIN)/playwright install --with-deps chromium \
		|| { apt-get update && apt-get install -y --no-install-recommends chromium; }
	QCORE_PAGES=1 $(PYTEST) -n 0 tests/pages

test-versions:  ## interop tests at the oldest and newest transformers, peft, safetensors, bitsandbytes
	PYTHON=$(PYTHON) tests/versions/run.sh oldest newest core

test-matrix: $(STAMP)  ## adapters of PEFT 0.18 to 0.21 on five kinds of base: as PEFT merges them
	tests/versions/matrix.sh 0.18.1 0.19.0 0.19.1 0.20.0

torture: $(STAMP)  ## break runs for BUDGET minutes and print the sums; see docs/torture.md
	PYTHONPATH=tests $(BIN)/python -m torture --budget $(BUDGET) --seed $(SEED)

lint: $(STAMP)  ## formatter, linter, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy core/src/qcore
	$(BIN)/mypy qwen35_plugin/src/qcore_qwen35
	$(BIN)/mypy qwen36_plugin/src/qcore_qwen36
	$(BIN)/mypy multimodal_plugin/src/qcore_multimodal
	$(BIN)/lint-imports

docs: $(STAMP)  ## rewrite what docs/ derives from the source
	$(BIN)/python docs/generate.py

dev: $(STAMP)  ## just the environment

# torch first and alone: its version is pinned, so that no other package picks a larger build.
$(STAMP): constraints.txt requirements-dev.txt core/pyproject.toml qwen35_plugin/pyproject.toml \
		qwen36_plugin/pyproject.toml multimodal_plugin/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt \
		-r requirements-dev.txt -e core -e qwen35_plugin -e qwen36_plugin \
		-e "multimodal_plugin[video]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-versions .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
