# Works from a clean clone: each target creates .venv and installs what it needs,
# and installs again only when pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test newest lint parity slow notebooks docs tpu cuda clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/with-plot  ## encode and decode the bundled speech: a table, demo.wav and demo.png
	$(BIN)/mimi-jax roundtrip mimi_jax/samples/speech.flac -o demo.wav

# Two files at a time: one alone, most of which is compiling, leaves a core half idle.
test: .venv/with-dev lint  ## lint, then run the tests (no torch, no network, no GPU)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

newest:  ## run a part of the tests on the newest Python of this machine, with the newest JAX
	.ci/newest

lint: .venv/with-dev  ## check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

parity: .venv/with-dev .venv/with-parity .venv/with-peers  ## compare with transformers and moshi
	$(BIN)/python -m pytest -m "(parity or network) and not slow" -rs

slow: .venv/with-dev .venv/with-parity .venv/with-peers  ## run the slow tests, among them half an hour of audio at full size
	$(BIN)/python -m pytest -m slow

notebooks: .venv/with-dev  ## run the notebooks, and the code on the pages in docs/
	$(BIN)/python -m pytest -m notebooks

# pdoc warns of names that are imported when they are first used, and finds them.
API := mimi_jax $(addprefix mimi_jax.,config boundary model checkpoint export files nn ops quality streams \
  tokenization tokens train serve)

docs: .venv/with-dev .venv/with-docs  ## the API from its docstrings, in build/docs
	@PYTHONWARNINGS=ignore::UserWarning $(BIN)/pdoc --docformat google --output-directory build/docs $(API)

# What compiles for devices stays out of .venv: where it is installed, JAX looks for them in every process.
tpu: .venv/with-dev .venv/with-libtpu  ## compile for a TPU of eight chips, on any Linux machine
	PYTHONPATH=.venv/libtpu $(BIN)/python -m pytest -m "slow or not slow" -rs tests/benchmarks/test_ahead.py

cuda: .venv/with-dev .venv/with-cuda-compiler  ## compile for eight NVIDIA GPUs, on any Linux machine
	PYTHONPATH=.venv/cuda $(BIN)/python -m pytest -m "slow or not slow" -rs tests/benchmarks/test_ahead.py \
	  tests/benchmarks/test_launches.py

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .hypothesis build dist demo.wav demo.png
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mimi_jax needs Python 3.11 or newer, $(PYTHON) is not; name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	  exit 1; }
	@echo "creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/with-peers: pyproject.toml .venv/created
	@echo "installing moshi and codec-bpe"
	@$(PIP_INSTALL) --no-deps moshi==0.2.13 codec-bpe==1.4.1
	@touch $@

.venv/with-libtpu: pyproject.toml .venv/created
	@echo "installing libtpu"
	@$(PIP_INSTALL) --upgrade --target .venv/libtpu libtpu
	@touch $@

.venv/with-cuda-compiler: pyproject.toml .venv/with-dev
	@echo "installing JAX's plugin for CUDA, 4 GB"
	@$(PIP_INSTALL) --upgrade --target .venv/cuda \
	  "jax-cuda13-plugin[with-cuda]==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')"
	@touch $@

.venv/with-%: pyproject.toml .venv/created
	@echo "installing mimi_jax[$*] (minutes the first time: it downloads what is missing)"
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $@
