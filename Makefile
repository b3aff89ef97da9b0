# make demo: a model improves itself on this machine, start to finish.
# make ablation: every method, three seeds each, and a table; more than an hour.
# make test: the whole test suite.
# make check: lint, types, layers.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo demo-coupled ablation test check format
setup: .venv/ready

# CPU: a complete lock, installed as it stands (requirements-cpu.txt says why). GPU: the tested pins.
.venv/ready: requirements.txt requirements-cpu.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("osft-mcore needs Python 3.11, found %d.%d; name one with: make setup PYTHON=/path/to/python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (minutes, once)"
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install -q -r requirements.txt; \
	else \
		$(BIN)/pip install -q --no-deps -r requirements-cpu.txt || { \
			echo "If torch==2.13.0+cpu was not found: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (pytorch.org, Get started)." >&2; exit 1; }; \
	fi
	@$(BIN)/pip install -q --no-deps -r requirements-dev.txt
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch, megatron.core, vllm; print("ready: torch %s, megatron-core %s, vllm %s" % (torch.__version__, megatron.core.__version__, vllm.__version__))' 2>/dev/null
	@touch $@

demo: setup
	@bash examples/arithmetic_cpu.sh

demo-coupled: setup
	@bash examples/arithmetic_coupled_cpu.sh

ablation: setup
	@$(BIN)/python tools/ablate.py

# Two at a time where a test is one process that mostly waits; the others start ranks of their own.
test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit; first=$$?; \
	$(BIN)/python -m pytest tests/distributed tests/e2e && exit $$first

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
