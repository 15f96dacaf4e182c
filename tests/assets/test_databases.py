"""Creation of MLflow's database in one atomic step."""

import mlflow
import pytest

from nic_assets.tracking.database import create_database


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
