# The same targets serve a person and CI. `make help` lists them.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Further overrides for apa-train, or arguments for pytest: make train ARGS="algo=ppo seed=1"
ARGS ?=
# PyTorch's version for these installs; pyproject.toml gives the range that is supported.
TORCH ?= 2.13.0

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow check format clean bench bench-floor bench-trl bench-gpu bench-learning bench-growth bench-head bench-processes

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

test-slow: install ## the tests that take minutes, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow $(ARGS)

bench: bench-floor bench-trl bench-growth bench-head bench-processes ## every figure of tests/benchmarks/RESULTS.md but bench-learning's (an hour or two on 2 cores)

# One iteration's work in all of them: 32 responses after prompts of 16 to 64 tokens.
BENCH_WORK := sampling.max_prompt_tokens=64 rollout_batch_size=32 minibatch_size=8 update_epochs=2 sampling.stop_strings=[]
BENCH := $(BIN)/apa-bench -m $(BENCH_WORK)
OUT := outputs/bench

bench-floor: install ## the phases of an iteration against the machine's measured rates
	rm -rf outputs/sweeps/bench_floor
	$(BENCH) model=pythia_14m,pythia_70m algo=apa,ppo name=bench_floor $(ARGS)
	$(BIN)/python tests/benchmarks/growth.py outputs/sweeps/bench_floor --out $(OUT)/floor.json

bench-trl: $(VENV)-bench/installed ## PPO and APA against TRL's PPO, in an environment that has both
	$(VENV)-bench/bin/python tests/benchmarks/against_trl.py --out $(OUT) $(ARGS)
	$(VENV)-bench/bin/python tests/benchmarks/against_trl.py --dtype bfloat16 --out $(OUT) $(ARGS)

bench-gpu: $(VENV)-bench/installed ## the same comparison on a GPU, of models that fill one
	$(VENV)-bench/bin/python tests/benchmarks/against_trl.py --model pythia_160m pythia_1b --dtype bfloat16 --responses 128 --tokens 128 --minibatch 32 --microbatch 32 --iterations 3 --turns 2 --out $(OUT)/gpu $(ARGS)

$(VENV)-bench/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/pip install --quiet torch==$(TORCH)
	$(VENV)-bench/bin/pip install --quiet -e . trl==1.12.0 torch==$(TORCH)
	touch $@

bench-learning: $(VENV)-bench/installed ## held-out score of PPO and APA against TRL's PPO at equal KL (hours; resumable)
	OMP_NUM_THREADS=1 $(VENV)-bench/bin/python tests/benchmarks/learning_against_trl.py --out $(OUT)/learning $(ARGS)

bench-growth: install ## samples per second and memory against response length, batch and model size
	rm -rf outputs/sweeps/bench_length outputs/sweeps/bench_batch outputs/sweeps/bench_size
	$(BENCH) model=pythia_14m sampling.max_new_tokens=32,64,128,256,512 bench.iterations=1 name=bench_length $(ARGS)
	$(BENCH) model=pythia_14m rollout_batch_size=8,16,32,64,128,256 bench.iterations=1 name=bench_batch $(ARGS)
	$(BENCH) model=pythia_14m,pythia_70m,pythia_160m rollout_batch_size=8 bench.iterations=1 name=bench_size $(ARGS)
	$(BIN)/python tests/benchmarks/growth.py outputs/sweeps/bench_length outputs/sweeps/bench_batch outputs/sweeps/bench_size --out $(OUT)/growth.json

bench-head: install ## memory of log-probs in pieces against logits of a whole batch
	$(BIN)/python tests/benchmarks/head.py $(ARGS)

bench-processes: install ## one process against two, each with all cores
	rm -rf outputs/sweeps/bench_processes
	$(BIN)/apa-train -m launch.processes=1,2 iterations=8 evaluation.every=0 checkpoint.every=0 name=bench_processes $(ARGS)
	$(BIN)/python tests/benchmarks/processes.py outputs/sweeps/bench_processes

check: install ## lint, formatting and types, as CI does
	$(BIN)/ruff check apa_cli tests
	$(BIN)/ruff format --check apa_cli tests
	$(BIN)/mypy

format: install ## fix lint and formatting where that can be done
	$(BIN)/ruff check --fix apa_cli tests
	$(BIN)/ruff format apa_cli tests

clean: ## remove the environment and everything that was built; outputs/ stays
	rm -rf $(VENV) $(VENV)-bench build dist *.egg-info .pytest_cache .ruff_cache
	find apa_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +
