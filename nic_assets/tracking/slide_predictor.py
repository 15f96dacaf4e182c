"""The script of a slide model that MLflow calls with a table of slide files.

MLflow stores this file with each logged model (*models from code*) and runs it when the model is
loaded; no object is pickled. The code that predicts is this distribution's, as installed where the
model is loaded. :mod:`nic_assets.tracking.callable_model` logs it.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import mlflow
import pandas as pd  # mlflow depends on it
import polars as pl
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from nic_core.encoders import load_encoder
from nic_core.models.files import load_model
from nic_core.models.prediction import check_encoder, check_times
from nic_core.models.slide_table import SlideTableError, predict_table


class SlidePredictor(PythonModel):
    """A slide model and its encoder, which MLflow calls with a table of slide files."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the folders ``model`` and ``encoder`` of the artifacts, once for all calls."""
        self._model = load_model(Path(context.artifacts["model"]))
        self._encoder = load_encoder(Path(context.artifacts["encoder"]))
        check_encoder(self._model.card, self._encoder.card)
        # a server calls from several threads, and a prediction uses all cores
        self._lock = Lock()

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return :func:`nic_core.models.slide_table.predict_table` of a table; null is None.

        Parameters
        ----------
        params
            ``times``: list of times at which survival probabilities are predicted.

        Raises
        ------
        MlflowException
            The table or the times are invalid.
        """
        times = (params or {}).get("times", [])
        try:
            check_times(self._model.card, times)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        with self._lock:
            try:
                found = predict_table(
                    self._model, self._encoder, pl.from_pandas(model_input), times=times
                )
            except SlideTableError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(
            {
                # NaN, which pandas makes of None, is not JSON
                column.name: pd.Series(
                    column.to_list(), dtype=object if column.null_count() else None
                )
                for column in found
            }
        )


mlflow.models.set_model(SlidePredictor())
