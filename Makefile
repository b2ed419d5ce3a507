# Each target makes the virtual environment it needs, installs into it once, and says what it does.
#
#   make demo      train a small xLSTM on real text, plot, generate   (.venv-demo)
#   make test      lint, types, layer contract, tests                 (.venv)
#   make test-all  the same with the slow tests                       (.venv)
#   make lint      the checks of `make test` without the tests        (.venv)
#   make bench     speed beside the published packages                (.venv-bench)
#   make wheel     build dist/*.whl with the native CPU library       (.venv)
#   make clean     remove environments, caches and build products
#
# Variables: PYTHON=python3.12 chooses the interpreter (3.11 or newer), JOBS=2 the number of test
# processes, PIP_TORCH="..." adds arguments to the installation of PyTorch alone (for instance the
# `--index-url` that PyTorch's own installation page gives for a CPU-only or a CUDA build).

PYTHON ?= python3
JOBS ?= 2
PIP_TORCH ?=
PIP = -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INPUTS = pyproject.toml constraints.txt Makefile

.PHONY: help demo test test-all lint bench wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#   make/s/^#  //p' Makefile

demo: .venv-demo/.installed
	@.venv-demo/bin/openxlstm demo

test: lint
	@echo "== tests ($(JOBS) processes)"
	@OMP_NUM_THREADS=1 .venv/bin/pytest -n $(JOBS) -m "not slow" --timeout 300

test-all: lint
	@echo "== tests, slow ones included ($(JOBS) processes)"
	@OMP_NUM_THREADS=1 .venv/bin/pytest -n $(JOBS) --timeout 1800

lint: .venv/.installed
	@echo "== ruff"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@echo "== basedpyright"
	@.venv/bin/basedpyright --level error
	@echo "== layer contract"
	@.venv/bin/lint-imports

bench: .venv-bench/.installed
	@for benchmark in "mlstm_cpu --dtype float32" slstm_cpu "slstm_cpu --cell lstm" "train_step_cpu --dtype float32"; do \
	  echo "== $$benchmark"; set -- $$benchmark; name=$$1; shift; \
	  .venv-bench/bin/python benchmarks/$$name.py $$* || exit 1; done

wheel: .venv/.installed
	@rm -rf dist
	@.venv/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl
	@! ls dist | grep -q none-any || echo "a pure Python wheel, without the native library: no C++ compiler" \
	  "worked, or OPENXLSTM_BUILD_NATIVE=0 (kernels are compiled on first use instead)"

clean:
	rm -rf .venv .venv-demo .venv-bench dist build site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call environment,DIRECTORY,EXTRAS): create it, PyTorch first so that nothing else chooses its version.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found="$$($(PYTHON) --version 2>/dev/null | head -n 1)"; \
	  echo "openxlstm needs Python 3.11 or newer, and '$(PYTHON)' is $${found:-not a Python here}." \
	       "Name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot create virtual environments; install its venv package (on Debian and" \
	       "Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "== creating $(1) with $$($(PYTHON) --version)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "== installing PyTorch into $(1) (the large one; once)"
	@$(1)/bin/python $(PIP) $(PIP_TORCH) "$$(grep '^torch==' constraints.txt)"
	@echo "== installing openxlstm[$(2)] into $(1)"
	@$(1)/bin/python $(PIP) hatchling editables
	@$(1)/bin/python $(PIP) --no-build-isolation --editable ".[$(2)]"
	@touch $@
endef

.venv/.installed: $(INPUTS)
	$(call environment,.venv,dev)

.venv-demo/.installed: $(INPUTS)
	$(call environment,.venv-demo,train)

.venv-bench/.installed: $(INPUTS)
	$(call environment,.venv-bench,bench)
