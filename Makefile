# Everything runs in an isolated environment in this checkout; nothing else on the machine is touched.
#
#   make setup        build .venv with trimtab (editable) and its test extras; a no-op when up to date
#   make demo         a real language model learns a real job; prints where the report is
#   make test         set up, lint, then all tests that need no GPU
#   make laws         every law for every method on every architecture (make test takes a sample); slow
#   make test-gpu     tests that need a CUDA device
#   make test-torchao the tests of bases that torchao stores, in an environment that has it
#   make test-triton  the kernels of CUDA devices, interpreted on the CPU and compiled, and answers by grammars, in an
#                     environment with Triton
#   make test-oldest  the tests on the oldest supported torch and transformers; a large download
#   make jobs         three real jobs, each from a file to a report (about twenty minutes on two cores)
#   make bench        every benchmark, which takes hours; one of them: make bench ARGS=lora_step
#   make clean        remove environments and caches, but not the downloaded assets

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.trimtab-setup
ARGS   ?=

# Tests never reach a model hub, and two test processes share two cores.
TEST_ENV := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest

.PHONY: setup lint test laws test-gpu test-torchao test-triton test-oldest bench demo jobs clean

setup: $(STAMP)

# The environment is built anew when the packaging changes. `touch` comes last: a set-up that was
# interrupted is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Trimtab needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(PYTEST) -n 2 -m "not gpu and not slow" $(ARGS)

laws: setup
	TRIMTAB_LAWS=all $(PYTEST) -n 2 -m "not gpu" tests/laws $(ARGS)

test-gpu: setup
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu $(ARGS)

test-torchao: VENV := .venv-torchao
test-torchao:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test-torchao]'
	$(TEST_ENV) $(VENV)/bin/python -m pytest tests/models/test_arrived.py -k torchao $(ARGS)

test-triton: VENV := .venv-triton
test-triton:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test-triton]'
	$(TEST_ENV) $(VENV)/bin/python -m pytest -m "not gpu" tests/kernels/test_fused.py tests/kernels/test_fused_blocks.py \
		tests/engine/test_grammars.py $(ARGS)

test-oldest: VENV := .venv-oldest
test-oldest:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n 2 -m "not gpu and not slow" $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

demo: setup
	$(BIN)/python -m recipes.demo $(ARGS)

jobs: setup
	$(BIN)/python -m recipes.jobs.data
	for job in instructions sentiment topics; do $(BIN)/trimtab train recipes/jobs/$$job.yaml || exit 1; done

clean:
	rm -rf .venv .venv-oldest .venv-torchao .venv-triton build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.cache/*' -prune -exec rm -rf {} +
