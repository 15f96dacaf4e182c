# Thin targets; the commands behind them are in the README too.
PYTHON ?= python3
BIN := .venv/bin
export DAGSTER_HOME ?= $(CURDIR)

.PHONY: demo refresh ui mlflow test lint

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-tests: .venv/installed
	$(BIN)/pip install --quiet --group test
	touch $@

demo: .venv/installed  ## make the demo cohort, materialize every asset, print the results
	$(BIN)/python -m nic_core.demo data/demo
	$(BIN)/python -m nic_assets.operations.refresh
	@echo "Dagster: make ui      MLflow: make mlflow"

refresh: .venv/installed  ## materialize what is missing or stale
	$(BIN)/python -m nic_assets.operations.refresh

ui: .venv/installed  ## Dagster on http://127.0.0.1:3000
	$(BIN)/dagster dev --host 127.0.0.1 --port 3000

mlflow: .venv/installed  ## MLflow on http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --workers 1 \
		--backend-store-uri sqlite:///$${NIC_STORE:-data/store}/mlflow/mlflow.db --host 127.0.0.1 --port 5000

test: .venv/installed-tests
	$(BIN)/pytest --numprocesses auto

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
