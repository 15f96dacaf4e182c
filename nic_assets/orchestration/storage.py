"""Where Dagster keeps its records: SQLite files in the store, or a PostgreSQL server.

``dagster.yaml`` cannot choose between two storages, so it names this class, which chooses by
``NIC_DAGSTER_POSTGRES``. The URL, which may hold a password, stays in the environment: what
Dagster hands from process to process does not contain it.
"""

from __future__ import annotations

import os

import dagster as dg
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage, SqliteStorageConfig
from dagster._serdes import ConfigurableClassData

POSTGRES_VARIABLE = "NIC_DAGSTER_POSTGRES"


class Storage(DagsterSqliteStorage):
    """SQLite files under ``base_dir``, unless the environment names a PostgreSQL server."""

    @classmethod
    def from_config_value(  # type: ignore[override]  # what it makes need not be of its own kind
        cls, inst_data: ConfigurableClassData, config_value: SqliteStorageConfig
    ) -> DagsterStorage:
        """The storage that the environment asks for.

        Raises
        ------
        dagster.DagsterInvalidDefinitionError
            The variable holds no PostgreSQL URL, or the extra ``postgres`` is not installed.
        """
        url = os.environ.get(POSTGRES_VARIABLE)
        if not url:
            return super().from_config_value(inst_data, config_value)
        scheme, _, rest = url.partition("://")
        if scheme not in ("postgresql", "postgres") or not rest:
            raise dg.DagsterInvalidDefinitionError(
                f"{POSTGRES_VARIABLE} is no URL such as postgresql://user:password@host:5432/name"
            )
        try:
            from dagster_postgres import DagsterPostgresStorage
        except ModuleNotFoundError as error:
            raise dg.DagsterInvalidDefinitionError(
                f"{POSTGRES_VARIABLE} is set, but {error.name} is not installed; "
                "its extra brings it: pip install -e '.[postgres]'"
            ) from error
        # to SQLAlchemy a plain URL means another driver than the one that Dagster brings
        return DagsterPostgresStorage(f"postgresql+psycopg2://{rest}", inst_data=inst_data)
