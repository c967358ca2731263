# Two commands do everything, set-up included: `make demo` and `make test`.
# They need python 3.11 or later with pip and venv, and the package index on the first run.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out/quickstart
# The first that runs and is recent enough (a shim of that name may be there and not run).
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# One process a core, each with one thread: threads that wait for each other by spinning are slow
# as soon as two processes share a core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: help setup demo test test-slow test-all test-exhaustive sanitize docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      quantize the embedded model to int4 and print it beside the base"
	@echo "make test      the tests that need no GPU, no network and little time"
	@echo "make test-all  those and the slow ones (test-slow: only the slow ones)"
	@echo "make test-exhaustive  every document of every benchmark beside lm-eval: hours"
	@echo "make sanitize  the kernels' tests under address and undefined-behaviour sanitizers"
	@echo "make docs      the documentation as a site, in out/site; opens without a network"
	@echo "make lint      ruff and mypy, changing nothing"
	@echo "make format    let ruff rewrite what it can"
	@echo "make setup     only the virtual environment, in $(VENV)"
	@echo "make clean     remove what these made"

setup: $(STAMP)

# Set up again only when what is installed would change; the install itself is editable.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: python 3.11 or later is needed: $(or $(PYTHON),none found)" >&2; \
		echo "hint: name one: \`make PYTHON=/path/to/python3.12 ...\`" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "hint: some systems ship venv apart, as python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/unicomp run quickstart --out $(OUT) --overwrite

test: $(STAMP)
	$(PYTEST) -q -m "not slow and not exhaustive and not gpu and not network"

test-slow: $(STAMP)
	$(PYTEST) -q -m "slow and not gpu and not network"

test-all: test test-slow

# Hours, so neither `make test-all` nor CI: once before a release, and after scoring was touched.
test-exhaustive: $(STAMP)
	$(PYTEST) -q -m "exhaustive and not gpu and not network"

# The extension once more, beside the installed one. libstdc++ is there for torch's exceptions.
# AMX is modelled (tests/kernels/csrc_driver): every machine then runs its tiles.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
MODEL := -DUC_AMX_MODEL=uc_panels_scalar -I$(CURDIR)/tests/kernels/csrc_driver
SANITIZED := $(addprefix tests/kernels/test_,cpu.py nearest.py gram.py causal.py spans.py norm.py head.py)
PRELOAD = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libstdc++.so)

sanitize: $(STAMP)
	CFLAGS="$(SANITIZE) $(MODEL) -g -O1" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 LD_PRELOAD="$(PRELOAD)" \
		PYTHONPATH=$(CURDIR)/build/sanitize/lib $(BIN)/python -m pytest -q $(SANITIZED)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) build dist out src/unicomp.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find cli compress evaluate kernels recipes src tests benchmarks examples \
		-name __pycache__ -type d -prune -exec rm -rf {} +
