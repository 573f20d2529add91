# One word per deed. `make demo` is the first thing to run, `make check` the last before a commit.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
RUNS := runs
READY := .venv/.ready
# Says how long a target took, whether it came to a good end or not.
timed = @start=$$(date +%s); $(1); code=$$?; echo "make $@: $$(( $$(date +%s) - start )) s"; exit $$code

# Nearly every command and test starts further processes, which would all compile what they import.
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## make .venv with everything the project needs

# The marker is written last: an interrupted set-up is done again.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (about three minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; make PYTHON=python3.12 names another")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,faces]'
	@$(BIN)/python -c 'import torch, ray, tyro'
	@touch $@

demo: setup ## Earth by day to Earth by night: prepare, train, evaluate, translate (4 to 5 minutes on 2 cores)
	@$(BIN)/python -m jobs.prepare earth --image-size 32 --output $(RUNS)/earth/data
	@$(BIN)/python -m jobs.train --preset demo --data $(RUNS)/earth/data --output $(RUNS)/earth/run --num-workers 2
	@$(BIN)/python -m jobs.evaluate --checkpoint $(RUNS)/earth/run --data $(RUNS)/earth/data --output $(RUNS)/earth/evaluation --num-workers 0
	@$(BIN)/python -m jobs.translate --checkpoint $(RUNS)/earth/run --input $(RUNS)/earth/data --split test --output $(RUNS)/earth/translated --domain night --num-workers 0
	@echo "look at: $(abspath $(RUNS)/earth/evaluation/report.html)"

format: setup ## format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

lint: setup ## format and lint, nothing changed
	$(call timed,{ $(BIN)/ruff format --check --quiet . || { echo "run: make format"; false; }; } && $(BIN)/ruff check --quiet .)

types: setup ## mypy
	$(call timed,$(BIN)/mypy)

# One process takes all tests that need Ray, which mostly waits, two the rest; of the slow ones one (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
SMOKE := $(BIN)/python -m jobs.experiments --size smoke --seeds 1 --local-processes 2

test: setup ## everything essential, each real part once (at most 6 minutes on 2 cores; longer is a bug)
	$(call timed,$(PYTEST) -n 3 -m "not slow")

test-all: setup ## the rest: clusters, kills, browser, tracking servers, planted faults, smoke experiments (20 minutes)
	$(call timed,$(PYTEST) -n 2 -m slow && $(BIN)/python tests/mutants.py && out=$$(mktemp -d) && $(SMOKE) --output $$out && rm -r $$out)

check: lint types test ## what must be green before a commit

bench: ## our network and our data path beside their peers' on this machine (about 45 minutes)
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@.venv-bench/bin/python -m jobs.benchmark data
	@.venv-bench/bin/python -m jobs.benchmark network

experiments: setup ## the mission's comparisons at the CPU size into runs/mission (under 2 hours on 2 cores; goes on where it was)
	@$(BIN)/python -m jobs.experiments --size cpu --output $(RUNS)/mission

mutants: setup ## plant faults in the numerics and see that the tests catch them (a few minutes)
	@$(BIN)/python tests/mutants.py

chaos: setup ## kill workers, nodes, networks and storage under training, and print what came of it (about 15 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

soak: setup ## twice as many people as the endpoint can serve, for twenty minutes: right answers, no 5xx, flat memory
	@DDPM_SOAK_S=1200 $(PYTEST) -m slow tests/test_serve.py -k twice_as_many

cluster: setup ## a real Ray cluster of two nodes on this machine
	@PATH="$(abspath $(BIN)):$$PATH" bash cluster/local.sh up

cluster-down: ## stop exactly that cluster
	@PATH="$(abspath $(BIN)):$$PATH" bash cluster/local.sh down

clean: ## remove what the demo made (runs/earth)
	@rm -rf $(RUNS)/earth

.PHONY: help setup demo format lint types test test-all check bench experiments mutants chaos soak cluster cluster-down clean
