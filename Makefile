# Two commands matter on a fresh Debian or Ubuntu machine: `make demo` and `make test`.

BIN := .venv/bin
ARGS ?=
RANKS ?= 2,1

.DEFAULT_GOAL := help
.PHONY: help install install-worker demo test test-brokers test-tasks test-install storm soak fuzz bench-recovery bench-loading \
	dashboard-picture check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## RabbitMQ, what the tests need besides, a virtual environment; nothing to do when up to date
	@ops/install.sh --tests
	@ops/install_test_tools.sh

install-worker: ## the virtual environment alone: for a box whose broker is elsewhere, and that runs no tests
	@ops/install.sh --no-broker

demo: ## install, then two videos and a dead letter on a private broker (REELD_AMQP_URL: on that one)
	@ops/install.sh $(if $(REELD_AMQP_URL),--no-broker)
	@$(BIN)/reeld demo $(ARGS)

test: install ## install, then every test, with a real broker and real ranks (ARGS: pytest's arguments)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

test-brokers: install ## the tests that need a broker, on RabbitMQ 3.10, 4.0 and 4.3 (the newer ones in roots of their own)
	$(BIN)/python -m tests.brokers $(ARGS)

storm: install ## JOBS=1000 jobs under FAULTS faults (one for five jobs), by SEED, on RANKS=2,1; then the checker
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.storm --jobs $(or $(JOBS),1000) \
		$(if $(FAULTS),--faults $(FAULTS)) $(if $(SEED),--seed $(SEED)) --ranks $(RANKS) $(ARGS)

soak: install ## jobs without a pause for MINUTES=15, and whether memory, threads, descriptors or queues grow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.storm.soak --minutes $(or $(MINUTES),15) $(ARGS)

test-tasks: install ## every task on 1, 2, 3 and 4 ranks against plain DiffSynth, in every split (6 minutes)
	OMP_NUM_THREADS=1 REELD_EVERY_TASK=1 $(BIN)/pytest tests/distributed/test_tasks.py

test-install: install ## build a whole release and install it into a tree of its own (minutes, and 6 GB meanwhile)
	REELD_BUILD_RELEASE=1 $(BIN)/pytest -k release tests/service/test_install.py

fuzz: install ## send the daemon EXAMPLES=10000 odd messages: each must end as a job or a dead letter with a code
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/pytest -s -o timeout=7200 tests/broker/test_fuzz.py

bench-recovery: install ## seconds from a killed peer and a restarted broker to work again, beside their floors (RUNS=20)
	$(BIN)/python -m benchmarks.recovery --runs $(or $(RUNS),20) $(ARGS)

bench-loading: install ## as root: seconds to load a model from a cold disk, beside reading its files once
	$(BIN)/python -m benchmarks.loading $(ARGS)

dashboard-picture: install ## docs/images/dashboard.png: the dashboard's panels from a real run (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.dashboard $(ARGS)

check: install ## what a reviewer should not have to say: lint, format, types, who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_imports.py

clean: ## remove what was made here, the virtual environment included (installed Debian packages stay)
	rm -rf .venv .tools build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
