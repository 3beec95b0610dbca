# The two commands: `make demo` and `make test`. Both create .venv, install what they need, and run; a second run installs nothing.
#
#   PYTHON=python3.12   the interpreter that creates .venv (3.11 or later); an existing .venv is used as it is
#   TORCH=...           what pip installs for torch when .venv has none: a version, a wheel, or a path with options of pip
#   ARGS=...            passed on to `zoo demo` or pytest
#   PYTEST=pytest       for test-gpu: the environment that is active, where a GPU machine has its own and no network

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
PYTEST ?= .venv/bin/pytest

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
LINTED := zoo layers kernels eval __main__

# judges of the tests whose dependencies nobody needs, which an extra of the package cannot say
JUDGES := typeseg==0.2.7 mlxtend==0.25.0

# the checkout is the package, and mypy takes the package's name from the folder: a link gives it the right one, whatever the folder's
MYPY_ROOT := .venv/lint

.PHONY: demo test test-gpu lint docs clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo       train three tiny models, evaluate and compare them (runs/demo/report.html)"
	@echo "make test       run the tests"
	@echo "make test-gpu   run the tests that need a CUDA device"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the site (build/docs/index.html); broken links and references fail"
	@echo "make clean      remove .venv, caches and runs/"

demo: .venv/.demo
	.venv/bin/zoo demo $(ARGS)

# two processes of one thread each: the operations of tiny models are too small to be split among threads
test: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 $(ARGS)

test-gpu: $(if $(filter .venv/%,$(PYTEST)),.venv/.dev)
	$(PYTEST) tests/gpu -m gpu $(ARGS)

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@mkdir -p $(MYPY_ROOT) && ln -sfn "$(CURDIR)" $(MYPY_ROOT)/hybridzoo
	MYPYPATH=$(MYPY_ROOT) .venv/bin/mypy $(LINTED:%=-p hybridzoo.%)

docs: .venv/.docs
	.venv/bin/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf .venv build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# each stamp is written last, so an interrupted install is taken up again

.venv/.python:
	@p="$(PYTHON)"; if [ -x $(PY) ]; then p=$(PY); fi; \
	command -v "$$p" >/dev/null || { echo "error: no '$$p' here. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$p is $$("$$p" --version 2>&1)," \
		"hybridzoo needs Python 3.11 or later. Name one (and remove .venv if it is there): make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	if [ ! -x $(PY) ]; then echo "creating .venv"; "$$p" -m venv .venv || { rm -rf .venv; \
		echo "error: '$$p -m venv' failed. On Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }; fi; \
	$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@touch $@

.venv/.torch: .venv/.python
	@$(PY) -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) $(TORCH); }
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml
	@echo "installing hybridzoo with what the demo needs (a few minutes, once)"
	@$(PIP) -e '.[eval]'
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml
	@echo "installing hybridzoo with what its tests need (a few minutes, once)"
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(JUDGES)
	@touch .venv/.demo $@

.venv/.docs: .venv/.torch pyproject.toml
	@echo "installing hybridzoo with what its site needs (a few minutes, once)"
	@$(PIP) -e '.[eval,docs]'
	@touch $@
