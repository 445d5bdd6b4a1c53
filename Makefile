# The same targets serve a person and CI. `make help` lists them.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Further words for apa-train or pytest: make train ARGS="algo=ppo seed=1"
ARGS ?=
# PyTorch's version for these installs; pyproject.toml gives the range that is supported.
TORCH ?= 2.13.0

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow check format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(VENV)/installed ## create .venv and install apa-cli with everything its tests need

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet -e '.[test,tensorboard,vader,quantization]' torch==$(TORCH)
	touch $@

train: install ## run the main job: APA on the embedded default (4 minutes the first time, then about one)
	$(BIN)/apa-train $(ARGS)

test: install ## the quick tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

test-slow: install ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

check: install ## lint and formatting, as CI does
	$(BIN)/ruff check apa_cli tests
	$(BIN)/ruff format --check apa_cli tests

format: install ## mend lint and formatting where that can be done
	$(BIN)/ruff check --fix apa_cli tests
	$(BIN)/ruff format apa_cli tests

clean: ## remove the environment and everything that was built; outputs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find apa_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +
