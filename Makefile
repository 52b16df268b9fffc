# SPDX-License-Identifier: Apache-2.0
# make setup | demo | test | test-slow | lint. Everything lives in .venv; a stamp file keeps setup from running twice.
# PYTHON=...    the interpreter to use (3.10 or later); by default the first that works of the list below
# PIP_ARGS=...  further arguments for pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_ARGS ?=
PYTEST_ARGS ?=
# TVM would pin the threads of both processes to the same core.
PYTEST := TVM_NUM_THREADS=1 TVM_BIND_THREADS=0 $(BIN)/python -m pytest
CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3

.PHONY: setup demo test test-slow lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@set -e; if [ ! -x $(BIN)/python ]; then \
	  found=""; \
	  for p in $(if $(PYTHON),$(PYTHON),$(CANDIDATES)); do \
	    if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; \
	    then found="$$p"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: no Python 3.10 or later with the venv module; install one or give PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$found"; "$$found" -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[torch,peers,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) --skip-slow -n 2 --dist loadfile $(PYTEST_ARGS)

# The long matrix: every network x front end x grain, and the deepest architectures.
test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

clean:
	rm -rf build dist .demo .pytest_cache .ruff_cache *.egg-info
