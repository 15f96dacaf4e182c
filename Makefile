# Thin targets; docs/reference/cli.md and CONTRIBUTING.md explain the commands behind them.
PYTHON ?= python3
BIN := .venv/bin
# processes that run tests beside each other
WORKERS ?= auto
export DAGSTER_HOME ?= $(CURDIR)

LOCK := --constraint requirements/constraints.txt --build-constraint requirements/constraints.txt
HASHED := --require-hashes --no-deps --build-constraint requirements/constraints.txt

# the commands and steps of the library, for the environment without Dagster and MLflow;
# its packages have the versions of the other tests
CORE_TESTS ?= tests/slides/test_cli.py tests/models/test_prediction.py \
	tests/encoders/test_encoder_cli.py tests/demo/test_cohort.py tests/test_study_check.py \
	tests/test_external.py tests/test_predictions.py tests/test_verification.py \
	tests/test_packaging.py tests/test_parallel.py tests/test_examples.py

# some that touch every direct dependency
LOWEST_TESTS ?= tests/test_cohort.py tests/test_store.py tests/test_tables.py tests/demo/test_painting.py \
	tests/test_orientations.py tests/slides/test_cli.py tests/slides/test_grids.py \
	tests/slides/test_heatmaps.py tests/slides/test_patches.py tests/slides/test_slide_vendors.py \
	tests/models/test_cox.py tests/models/test_labels.py tests/models/test_metrics.py \
	tests/encoders/test_networks.py tests/assets/test_dependencies.py \
	tests/assets/test_staleness.py

.PHONY: demo refresh ui view mlflow test test-fast test-core test-lowest gpu-check lint docs \
	lock

# everything but torch with its hashes checked; then torch and this project (requirements/lock.py)
.venv/installed: pyproject.toml requirements/platform.txt requirements/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.3"
	$(BIN)/pip install --quiet $(HASHED) --requirement requirements/platform.txt
	$(BIN)/pip install --quiet $(LOCK) --editable '.[platform,view]'
	touch $@

.venv/installed-tests: .venv/installed requirements/dev.txt
	$(BIN)/pip install --quiet $(HASHED) --requirement requirements/dev.txt
	$(BIN)/pip check
	touch $@

# the library alone
.venv-core/installed: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv --clear .venv-core
	.venv-core/bin/pip install --quiet --upgrade "pip>=25.3"
	.venv-core/bin/pip install --quiet $(LOCK) --editable . --group test-core
	touch $@

# the lowest versions that pyproject.toml admits
.venv-lowest/installed: pyproject.toml requirements/lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/pip install --quiet --upgrade "pip>=25.3"
	.venv-lowest/bin/pip install --quiet --no-deps --requirement requirements/lowest.txt
	.venv-lowest/bin/pip install --quiet --constraint requirements/lowest.txt --editable .
	.venv-lowest/bin/pip check
	touch $@

demo: .venv/installed  ## make the demo cohort, materialize every asset, print the results
	$(BIN)/nic demo data/demo --external 16
	$(BIN)/nic refresh
	$(BIN)/nic report --out data/report.html
	@echo "Slides: make view      Dagster: make ui      MLflow: make mlflow"

refresh: .venv/installed  ## materialize what is missing or stale
	$(BIN)/nic refresh

ui: PORT ?= 3000
ui: .venv/installed  ## Dagster on http://127.0.0.1:3000, or make ui PORT=...
	@$(BIN)/python -m nic_assets.operations.port $(PORT)
	$(BIN)/dagster dev --host 127.0.0.1 --port $(PORT)

view: PORT ?= 8765
view: .venv/installed  ## the slides and products on http://127.0.0.1:8765, or make view PORT=...
	$(BIN)/nic view --port $(PORT)

MLFLOW_ADDRESS := "from nic_assets.tracking.database import database_uri; \
	from nic_core.store import Store; print(database_uri(Store.from_environment()))"
mlflow: PORT ?= 5000
mlflow: .venv/installed  ## MLflow on http://127.0.0.1:5000, or make mlflow PORT=...
	@$(BIN)/python -m nic_assets.operations.port $(PORT)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --workers 1 \
		--backend-store-uri "$$($(BIN)/python -c $(MLFLOW_ADDRESS))" \
		--host 127.0.0.1 --port $(PORT)

# in the order of tests/conftest.py: slow files first
test: .venv/installed-tests  ## every test
	$(BIN)/pytest --numprocesses $(WORKERS) --no-loadscope-reorder

test-fast: .venv/installed-tests  ## those that need no other process, no GPU and little time
	$(BIN)/pytest --numprocesses $(WORKERS) -m "not slow and not integration and not gpu"

test-core: .venv-core/installed  ## the library where Dagster and MLflow are not installed
	.venv-core/bin/python .ci/absent.py dagster dagster_webserver mlflow
	.venv-core/bin/pytest --numprocesses $(WORKERS) \
		-m "not integration and not gpu" $(CORE_TESTS)

test-lowest: .venv-lowest/installed  ## some tests with the lowest versions
	.venv-lowest/bin/pytest --numprocesses $(WORKERS) -m "not gpu" $(LOWEST_TESTS)

gpu-check: .venv/installed-tests  ## tests and measurements on a GPU: data/gpu/gpu.json, gpu.md
	$(BIN)/python -m benchmarks.gpu data/gpu

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-tests  ## the pages, as site/
	$(BIN)/mkdocs build --strict

lock: .venv/installed  ## write requirements/*.txt; make lock UPGRADE=--upgrade for newer versions
	$(BIN)/pip install --quiet $(LOCK) --group lock
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python requirements/lock.py $(UPGRADE)
