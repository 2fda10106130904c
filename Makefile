# `make demo` and `make test` work on a fresh clone with nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install, then the whole chain on real digits: about two minutes"
	@echo "make test    install, then lint, types, import contracts and all tests"
	@echo "make lint    the same without the tests"
	@echo "make clean   remove the virtual environment"

demo: $(VENV)/.edgekd
	$(BIN)/edgekd demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.edgekd-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# An install is repeated only when what it reads has changed.
$(VENV)/.edgekd: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"edgekd needs Python 3.11 or newer, $(PYTHON) is {v}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# By itself first: an installed torch keeps pip from looking for another build when packages below ask for one.
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e .
	@touch $@

$(VENV)/.edgekd-dev: $(VENV)/.edgekd
	$(PIP) -e ".[dev,timm,hf,track,search,trt-verify]"
	@touch $@

clean:
	rm -rf $(VENV)
