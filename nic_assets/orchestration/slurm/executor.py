"""Dagster's executor with a Slurm job for each step.

The run's process submits the jobs and follows the event log, to which the jobs write. A job is
named ``nic-<run id>-<step>``, so a run worker that replaces a killed one finds the jobs that run.
Slurm's state decides why a job ended: a job that is ended by SIGTERM (pre-empted, out of time,
cancelled) exits without a record of its own (:data:`EXIT_WHEN_INTERRUPTED`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import multiple_process_executor_requirements

from nic_assets.orchestration.executors import DEVICE_TAG
from nic_assets.orchestration.internals import (
    CheckStepHealthResult,
    EngineEventData,
    RetryMode,
    SerializableErrorInfo,
    StepDelegatingExecutor,
    StepFailureData,
    StepHandler,
    dagster_command,
)
from nic_assets.orchestration.retries import EXIT_WHEN_INTERRUPTED
from nic_assets.orchestration.slurm.jobs import (
    Job,
    SlurmError,
    cancel,
    ending,
    find_job,
    jobs_named,
    submit,
)
from nic_assets.orchestration.slurm.settings import (
    RESOURCES_TAG,
    SlurmSettings,
    load_slurm_settings,
)

if TYPE_CHECKING:
    from nic_assets.orchestration.internals import (
        ExecutionPlan,
        IStepContext,
        PlanOrchestrationContext,
        StepHandlerContext,
    )

# The threads of a step are the cores of its job (nic_core.parallel.cores), unless the environment
# of the run limits them. `exec` lets Slurm's signals reach the step.
SCRIPT = """\
#!/bin/sh
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}}"
export POLARS_MAX_THREADS="${{POLARS_MAX_THREADS:-$SLURM_CPUS_PER_TASK}}"
export {exit_when_interrupted}=1
echo "job $SLURM_JOB_ID on $SLURMD_NODENAME, CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
exec {command}
"""

_STEP_ENDED = (
    dg.DagsterEventType.STEP_SUCCESS,
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.STEP_UP_FOR_RETRY,
)


def job_name(run_id: str, step: str) -> str:
    """Return the name of the jobs of a step of a run: one for each attempt."""
    return f"nic-{run_id}-{step}"


class SlurmStepHandler(StepHandler):
    """Launches, watches and terminates the job of a step."""

    def __init__(self, settings: SlurmSettings) -> None:
        self._settings = settings
        # of the steps that this process launched or found: job, and the last message about it
        self._jobs: dict[str, str] = {}
        self._shown: dict[str, str] = {}
        # steps whose job could not be submitted because Slurm did not answer, with the reason
        self._unsubmitted: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Name in Dagster's log."""
        return "slurm"

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Submit the job of a step, in place of those that earlier attempts left behind."""
        context = step_handler_context
        step = _step(context)
        tags = context.step_tags[step]
        run = context.dagster_run
        try:
            resources = self._settings.resources(
                gpu_bound=tags.get(DEVICE_TAG) == "gpu", tag=tags.get(RESOURCES_TAG)
            )
        except ValueError as error:
            yield _failure(context.get_step_context(step), str(error))
            return
        folder = self._settings.logs / run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        script = SCRIPT.format(
            exit_when_interrupted=EXIT_WHEN_INTERRUPTED,
            command=shlex.join(dagster_command(context.execute_step_args.get_command_args())),
        )
        arguments = [
            f"--job-name={job_name(run.run_id, step)}",
            f"--output={folder}/{step}-%j.log",
            f"--chdir={Path.cwd()}",
            "--export=ALL",
            "--no-requeue",  # the step's retry policy starts it again, not Slurm
            *resources.arguments(),
        ]
        earlier = [run.run_id, *filter(None, (run.parent_run_id, run.root_run_id))]
        try:
            cancel(jobs_named(*(job_name(run_id, step) for run_id in dict.fromkeys(earlier))))
            job = submit(script, arguments)
        except SlurmError as error:
            if error.transient:
                self._unsubmitted[step] = f"the job of {step} could not be submitted: {error}"
            else:
                yield _failure(context.get_step_context(step), str(error))
            return
        self._jobs[step] = job
        yield dg.DagsterEvent.step_worker_starting(
            context.get_step_context(step),
            f"Submitted job {job} to Slurm: sbatch {shlex.join(resources.arguments())}",
            metadata={"Slurm job": job, "log": self._log(run.run_id, step, job)},
        )

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Ask Slurm for the state of a step's job.

        An unhealthy step is retried by its policy; a step that must not be retried is recorded as
        failed here. While Slurm does not answer, the job counts as running.
        """
        context, run_id = step_handler_context, step_handler_context.dagster_run.run_id
        step = _step(context)
        if reason := self._unsubmitted.pop(step, None):
            return CheckStepHealthResult.unhealthy(reason)
        try:
            job = self._find(run_id, step)
        except SlurmError as error:
            self._show(context.get_step_context(step), f"Slurm does not answer: {error}")
            return CheckStepHealthResult.healthy()
        if job is not None:
            self._show_job(context.get_step_context(step), job)
        end = ending(job) if job is not None else None
        if (job is not None and end is None) or _has_ended(context.instance, run_id, step):
            return CheckStepHealthResult.healthy()
        if end is None:
            return CheckStepHealthResult.unhealthy(f"Slurm has no job of {step} (any more)")
        if end.retry:
            return CheckStepHealthResult.unhealthy(end.message)
        _failure(context.get_step_context(step), end.message)
        return CheckStepHealthResult.healthy()

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Cancel the job of a step."""
        context = step_handler_context
        step = _step(context)
        for job in cancel(jobs_named(job_name(context.dagster_run.run_id, step))):
            yield dg.DagsterEvent.engine_event(
                context.get_step_context(step), f"Cancelled Slurm job {job.id}"
            )

    def show_start(self, step_context: IStepContext, run_id: str) -> None:
        """Record the node of a step that has just started; a short one may end before the check."""
        try:
            job = self._find(run_id, step_context.step.key)
        except SlurmError as error:
            self._show(step_context, f"Slurm does not answer: {error}")
            return
        if job is not None:
            self._show_job(step_context, job)

    def cancel_run(self, run_id: str, steps: Sequence[str]) -> None:
        """Cancel the jobs of a run."""
        cancel(jobs_named(*(job_name(run_id, step) for step in steps)))

    def _find(self, run_id: str, step: str) -> Job | None:
        """Return the job of the last attempt of a step; None if Slurm has none any more."""
        if step not in self._jobs:
            found = jobs_named(job_name(run_id, step))
            if not found:
                return None
            self._jobs[step] = found[-1].id
        return find_job(self._jobs[step])

    def _show_job(self, step_context: IStepContext, job: Job) -> None:
        if job.state == "PENDING" and job.reason != "None":
            self._show(step_context, f"Slurm job {job.id} waits ({job.reason})", job)
        elif job.state == "RUNNING":
            self._show(step_context, f"Slurm job {job.id} runs on {job.node}", job)

    def _show(self, step_context: IStepContext, message: str, job: Job | None = None) -> None:
        """Record an event of a step, unless it says the same as the last one."""
        step = step_context.step.key
        if self._shown.get(step) != message:
            self._shown[step] = message
            # Dagster's UI shows metadata of these events, and not those of the submission
            metadata: dict[str, dg.MetadataValue[Any] | str] = {}
            if job is not None:
                metadata = {
                    "Slurm job": job.id,
                    "node": job.node or "none yet",
                    "log": self._log(step_context.run_id, step, job.id),
                }
            dg.DagsterEvent.engine_event(step_context, message, EngineEventData(metadata))

    def _log(self, run_id: str, step: str, job: str) -> dg.PathMetadataValue:
        return dg.MetadataValue.path(self._settings.logs / run_id / f"{step}-{job}.log")


class SlurmExecutor(StepDelegatingExecutor):
    """Runs each step of a run as a Slurm job."""

    def __init__(self, settings: SlurmSettings) -> None:
        self._handler = SlurmStepHandler(settings)
        super().__init__(
            self._handler,
            retries=RetryMode.ENABLED,
            check_step_health_interval_seconds=settings.poll_seconds,
        )

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        """Run the steps of a plan; yield the events of the run."""
        try:
            for event in super().execute(plan_context, execution_plan):
                if event.event_type is dg.DagsterEventType.STEP_WORKER_STARTED and event.step_key:
                    step = execution_plan.get_executable_step_by_key(event.step_key)
                    self._handler.show_start(plan_context.for_step(step), plan_context.run_id)
                yield event
        finally:
            # Dagster leaves the steps of an interrupted run alone if a new worker may resume it,
            # even if a person has cancelled it
            run = plan_context.instance.get_run_by_id(plan_context.run_id)
            if run is None or run.status is dg.DagsterRunStatus.CANCELING:
                keys = [step.key for step in execution_plan.steps]
                self._handler.cancel_run(plan_context.run_id, keys)


@dg.executor(name="slurm", requirements=multiple_process_executor_requirements())
def slurm_executor(_: dg.InitExecutorContext) -> SlurmExecutor:
    """Return the executor, with the settings of :func:`load_slurm_settings`."""
    return SlurmExecutor(load_slurm_settings())


def _step(context: StepHandlerContext) -> str:
    """Return the one step that Dagster asks a handler about."""
    keys = context.execute_step_args.step_keys_to_execute
    assert keys is not None
    return keys[0]


def _failure(step_context: IStepContext, message: str) -> dg.DagsterEvent:
    """Record that a step failed and is not retried."""
    error = SerializableErrorInfo(message, stack=[], cls_name=None)
    data = StepFailureData(error, user_failure_data=None)  # type: ignore[no-untyped-call]
    return dg.DagsterEvent.step_failure_event(step_context, data)


def _has_ended(instance: dg.DagsterInstance, run_id: str, step: str) -> bool:
    """Return whether the last attempt of a step has recorded its own end."""
    kinds = {*_STEP_ENDED, dg.DagsterEventType.STEP_WORKER_STARTING}
    events = [
        entry.dagster_event.event_type
        for entry in instance.all_logs(run_id, of_type=kinds)
        if entry.dagster_event is not None and entry.step_key == step
    ]
    return bool(events) and events[-1] in _STEP_ENDED
