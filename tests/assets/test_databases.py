"""MLflow's database is there whole or not at all."""

import mlflow
import pytest

from nic_assets.tracking.database import make_database


def test_a_database_is_made_once_and_whole(tmp_path, monkeypatch):
    path = tmp_path / "mlflow" / "mlflow.db"
    make_database(f"sqlite:///{path}")
    assert [file.name for file in path.parent.iterdir()] == ["mlflow.db"]
    mlflow.MlflowClient(f"sqlite:///{path}").create_experiment("encoders", str(tmp_path))
    make_database(f"sqlite:///{path}")
    assert mlflow.MlflowClient(f"sqlite:///{path}").get_experiment_by_name("encoders")


def test_a_database_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "mlflow.db"

    def cut_short(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "search_experiments", cut_short)
        with pytest.raises(KeyboardInterrupt):
            make_database(f"sqlite:///{path}")
    assert list(tmp_path.iterdir()) == []


def test_a_server_has_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_database("http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []
