# The targets a person and the continuous integration use. Another environment: make test VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
TRAIN := $(VENV)/.installed-train
DEV := $(VENV)/.installed-dev
# pip compiles to byte code on one core, and takes as long for it as for all the rest: see the end of $(DEV).
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
# Test processes of one thread each: torch's own threads would only compete for the same cores.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv demo test coverage test-slow test-gpu lint format docs wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

venv: $(DEV) ## the virtual environment, at the tested versions of constraints.txt
	$(if $(filter venv,$(MAKECMDGOALS)),@echo "Activate it in each terminal: source $(BIN)/activate")

$(TRAIN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make ... PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Debian: apt-get install python3-venv"; exit 1; }
	$(INSTALL) ".[train]"
	@touch $@

$(DEV): $(TRAIN)
	$(INSTALL) ".[train,dev]"
	$(BIN)/python -m pip check
	@$(BIN)/python -m compileall -q -j $(JOBS) $(VENV)/lib >/dev/null || true # templates in some packages are no Python
	@touch $@

demo: $(TRAIN) ## the main job on the built-in cohort, into demo/ (about five minutes, with the installation)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python pipelines/smoke.py --out demo

test: venv ## the fast tests
	$(TEST) -m "not slow and not gpu"

coverage: venv ## the fast tests, and which lines they reach
	$(TEST) -m "not slow and not gpu" --cov --cov-report=term

test-slow: venv ## the long tests
	$(TEST) -m slow

test-gpu: venv ## what needs a CUDA device; skips, and says so, without one
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict medim pipelines benchmarks

format: venv ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv ## the site, into site/
	$(BIN)/mkdocs build --strict

wheel: venv ## wheel and sdist, into dist/
	$(BIN)/python -m build

clean: ## everything that the targets above made, but the virtual environment
	rm -rf build dist site demo .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
