"""Creation of MLflow's database in one atomic step."""

import dagster as dg
import mlflow
import pytest

from nic_assets.tracking import Tracking
from nic_assets.tracking.database import check_dagster_storage, create_database
from nic_core.store import Store


@pytest.mark.slow
def test_the_database_is_created_once(tmp_path):
    path = tmp_path / "mlflow" / "mlflow.db"
    create_database(f"sqlite:///{path}")
    assert [file.name for file in path.parent.iterdir()] == ["mlflow.db"]
    mlflow.MlflowClient(f"sqlite:///{path}").create_experiment("encoders", str(tmp_path))
    create_database(f"sqlite:///{path}")
    assert mlflow.MlflowClient(f"sqlite:///{path}").get_experiment_by_name("encoders")


@pytest.mark.slow
def test_an_interrupted_creation_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "mlflow.db"

    def interrupt(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "search_experiments", interrupt)
        with pytest.raises(KeyboardInterrupt):
            create_database(f"sqlite:///{path}")
    assert list(tmp_path.iterdir()) == []


def test_no_database_is_created_for_a_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_database("http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my store#1%20ü?", "a[1] b", "plain"])
def test_the_database_is_in_a_store_of_any_name(tmp_path, name):
    store = Store(tmp_path / name)
    Tracking.in_store(store).client.create_experiment("x")
    assert (store.mlflow / "mlflow.db").stat().st_size > 0
    assert Tracking.in_store(store).client.get_experiment_by_name("x") is not None


@pytest.mark.parametrize("name", ["q?", "a%20b"])
def test_a_folder_that_dagster_cannot_address_is_refused(monkeypatch, name):
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", f"data/{name}/dagster")
    with pytest.raises(dg.DagsterInvalidDefinitionError, match="NIC_DAGSTER_STORAGE to another"):
        check_dagster_storage()
    monkeypatch.setenv("NIC_DAGSTER_STORAGE", "data/a[1] b#ü/dagster")
    check_dagster_storage()
