"""MLflow: one MLflow run for a run and all its resumes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aer_megatron.report.metrics import Metric
from aer_megatron.report.samples import Sample
from aer_megatron.report.sinks.base import (
    SAMPLE_COLUMNS,
    Record,
    Sink,
    SinkRun,
    alarm_of,
    numbers,
    sample_rows,
    step_of,
)
from aer_megatron.report.writer import flat_options

_RUN_ID_TAG = "aer_megatron.run_id"
_PARAMETERS_PER_CALL = 100  # MLflow's limits
_LONGEST_PARAMETER = 6000


class MlflowSink(Sink):
    """Sends to ``experiment``, which is made where there is none, at ``tracking_uri``.

    Without one it is MLflow's own: MLFLOW_TRACKING_URI, or its default. The configuration is kept as parameters.
    A metric's ``@``, which MLflow does not take, becomes ``_at_``.
    """

    package = "mlflow"
    install = "aer-megatron[mlflow]"
    remote = True

    def __init__(self, run: SinkRun, *, experiment: str = "aer-megatron", tracking_uri: str | None = None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric as Point

        self._point = Point
        self._client = MlflowClient(tracking_uri=tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        former = self._client.search_runs([place], f"tags.`{_RUN_ID_TAG}` = '{run.id}'", max_results=1)
        if former:
            self._id = former[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(place, run_name=run.name, tags={_RUN_ID_TAG: run.id}).info.run_id
        self._write_parameters(run.config)

    def _write_parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        every = [Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in flat_options(config)]
        for start in range(0, len(every), _PARAMETERS_PER_CALL):
            self._client.log_batch(self._id, params=every[start : start + _PARAMETERS_PER_CALL])

    def step(self, record: Record) -> None:
        now_ms, step = int(1000 * time.time()), step_of(record)
        values = numbers(record).items()
        self._client.log_batch(
            self._id, metrics=[self._point(name.replace("@", "_at_"), value, now_ms, step) for name, value in values]
        )
        if alarm := alarm_of(record):
            self._client.set_tag(self._id, str(Metric.AER_ALARM), alarm)

    def picture(self, file: Path) -> None:
        self._client.log_artifact(self._id, str(file))

    def samples(self, samples: Sequence[Sample]) -> None:
        table = {"columns": SAMPLE_COLUMNS, "data": sample_rows(samples)}  # the form of MLflow's own tables
        self._client.log_dict(self._id, table, "samples.json")
        self._client.set_tag(self._id, "mlflow.loggedArtifacts", '[{"path": "samples.json", "type": "table"}]')

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")
