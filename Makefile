# Each target does its own set-up: a virtual environment at .venv with pinned versions. Safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-vllm check clean

demo: $(READY)
	$(BIN)/kvfold demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[cross]' -c constraints.txt
	$(BIN)/python -m pytest -q -n 2 -m slow $(PYTEST_ARGS)

# Against a real vLLM, in an environment of its own (3.4 GB).
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -q -n 2 --dist loadfile tests/vllm $(PYTEST_ARGS)

.venv-vllm/.ready: scripts/install-vllm scripts/vllm-constraints.txt
	scripts/install-vllm

check: $(READY)
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

# torch first and alone: asked for as another package's need, pip would fetch a build with gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("kvfold needs Python 3.11 or newer (set PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev,gguf]' -c constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
