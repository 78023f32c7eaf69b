# A fresh machine needs Python 3.12 or newer, pip and make; everything else goes into .venv.
# Another interpreter: `make test PYTHON=/path/to/python3.13`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FUZZ := 1000
# The versions the checks ran with; without them a new release of a dependency could break `make`.
# Python compiles a module when it is first imported: of some 20,000 files most never are.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Where there is no accelerator, libtpu (of the extra `dev`) need not look for one, loudly.
ifeq ($(wildcard /dev/nvidia* /dev/kfd /dev/accel* /dev/vfio/[0-9]*),)
export JAX_PLATFORMS ?= cpu
endif

# The tests start some hundred processes, which import the same modules: they keep what they compile.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-chat test test-all fuzz soak test-tpu-aot test-gpu-aot dist test-wheel notebooks check lint docs clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: $(VENV)/.core  ## Convert the demo model, extend its context with DCA, print and plot the result
	$(BIN)/python examples/demo.py

demo-chat: $(VENV)/.core  ## Ask a real chat model about a long text (BOOK=file), with DCA and without
	$(BIN)/python examples/demo_chat.py $(if $(BOOK),--book '$(BOOK)')

test: check  ## What every change must pass: lint, types, documentation, tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: check  ## Before a change lands: with demos, benchmarks and runs of several processes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not by_name and not tpu_aot and not gpu_aot"

test-tpu-aot: $(VENV)/.dev  ## Compile kernels and whole models for every TPU, without one (a quarter of an hour)
	$(BIN)/python -m pytest tests/tpu_aot -m "" -n 2 --dist worksteal -rP

fuzz: $(VENV)/.dev  ## Read thousands of damaged files of every kind (FUZZ of each; some minutes)
	DCA_JAX_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py -rP

soak: $(VENV)/.dev  ## Ask a server many things at once for ten minutes, and compare its answers
	PYTHONPATH=. $(BIN)/python benchmarks/serving.py load --requests 1000000 --minutes 10 --compare 200

# JAX's plugin alone, without CUDA's libraries, and where no other command finds it.
test-gpu-aot: $(VENV)/.dev $(VENV)/cuda/.plugin  ## Compile for H200s, A100, L40S and B200 without one, and interpret the kernels of backends chosen by name only (a quarter of an hour)
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pytest -m "by_name or gpu_aot" -n 2 --dist worksteal -rP

$(VENV)/cuda/.plugin: $(VENV)/pyvenv.cfg constraints.txt
	@$(PIP_INSTALL) --no-deps --upgrade --target $(@D) jax-cuda13-plugin jax-cuda13-pjrt
	@touch $@

dist: $(VENV)/.build  ## Build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

test-wheel: dist  ## Install the wheel into clean environments, core and each extra, and use it there (needs the network)
	$(BIN)/python tests/installed.py dist/*.whl

notebooks: $(VENV)/pyvenv.cfg  ## Write the notebooks (.ipynb) anew from their scripts (.py)
	$(BIN)/python tests/notebook_files.py

# Sphinx keeps one core busy, PyTorch's install and then Pyright the other; what each says stays together.
check: $(VENV)/.docs  ## lint and docs, side by side
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint docs

lint: $(VENV)/.dev  ## Ruff (rules and format) and Pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs  ## Build the documentation strictly into docs/_build/html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -b html docs docs/_build/html

clean:  ## Remove .venv and everything built
	rm -rf $(VENV) build dist outputs docs/_build docs/_generated .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an install is done once, and again when pyproject.toml or constraints.txt changes.
$(VENV)/.core: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing dca_jax into $(VENV) (some minutes; 1 GB)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.docs: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing dca_jax and what its documentation needs into $(VENV) (a minute or two)"
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $(VENV)/.core $@

$(VENV)/.dev: $(VENV)/.docs
	@echo "Installing what the tests need into $(VENV) (some minutes; 6 GB in all, most of it PyTorch)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.build: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@$(PIP_INSTALL) build hatchling
	@touch $@

$(VENV)/pyvenv.cfg:
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo "No Python at '$(PYTHON)'. Install Python 3.12 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "dca_jax needs Python 3.12 or newer; '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1)." >&2; \
	  echo "Install a newer Python, or name one you have: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@'$(PYTHON)' -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
