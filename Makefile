# Everything from a bare machine: each target makes its own .venv and installs into it.
#
#   make demo    real media to real media on a tiny checkpoint, in outputs/demo/
#   make test    the tests (ARGS="-m 'not slow'" for the quick ones)
#   make lint    ruff and pyright
#   make clean   removes .venv and outputs/demo
#
# Another interpreter (3.11 or newer): make demo PYTHON=python3.12

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/core.stamp
	$(BIN)/python -m idlora_jax.demo $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) outputs/demo

# The stamps are older than pyproject.toml exactly when the dependencies may have changed.
$(VENV)/made.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "make: %s is Python %d.%d, expected 3.11 or newer; say which one to use: make demo PYTHON=python3.12" \
	  % (sys.executable, *sys.version_info[:2]))'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/core.stamp: $(VENV)/made.stamp
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/%.stamp: $(VENV)/made.stamp
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	@touch $@
