//! The presets: a table of the fields and spans of each known engine, with the published source of every name.

use super::identity::IdForm;

/// A durable-workflow engine or job queue whose fields and spans are known: a preset for the builder.
///
/// | engine | instance id | run id | status | engine spans that are adopted | pollers | spans that end their instance |
/// |---|---|---|---|---|---|---|
/// | `Dapr` | `durabletask.task.instance_id` | | `durabletask.runtime_status` | | | |
/// | `Duroxide` | | | | | | |
/// | `Restate` | | | | `restate_sdk_endpoint_handle` | | |
/// | `Temporal` | `temporalWorkflowID` | `temporalRunID` | | `RunWorkflow` | | |
/// | `Dbos` | `workflow_id`* | | | | `queues`, `queue` | `workflow` |
/// | `AwsDurable` | `executionArn` | | | `Lambda runtime invoke`, `Lambda function invocation` | | |
/// | `Underway` | `underway:` `job.id`* | | | | `process_next_task` | |
/// | `GraphileWorker` | `graphile:` `job_id`* | | | | | |
/// | `Apalis` | `apalis:` `task_id`* | | | | | |
/// | `Awa` | `awa:` `job.queue` `:` `job.id`* | | | | `run`, `poll_once` | |
///
/// A name with an asterisk is a common word, and counts only on spans of the engine's own target: a span of yours with a
/// field `job_id` stays as it is. Spans made through the OpenTelemetry API have no target, nor have those of a layer
/// [`with_target(false)`](tracing_opentelemetry::OpenTelemetryLayer::with_target).
///
/// The ids of a job queue repeat in the next database, so a prefix goes before them: the instance of graphile's job 7 is
/// `graphile:7`, for [`get`](crate::WorkflowContextStorage::get) and for `workflow.instance_id` on spans of your own.
///
/// None has a replay field: an engine that reports a replay at all goes on to new work in the same span. `AwsDurable` alone
/// has a [`replay_children_field`](crate::WorkflowContextStorageBuilder::replay_children_field), `isReplay`*.
/// A status is terminal by the words that end any instance, in any letter case. The reserved fields of this crate keep their
/// meaning beside all these. What each engine needs beyond this is in `docs/ENGINES.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// Dapr Workflow through `dapr-durabletask`.
    Dapr,
    /// `duroxide`, which opens no span: put `workflow.instance_id` on yours, or name their field in
    /// [`instance_id_fields`](crate::WorkflowContextStorageBuilder::instance_id_fields).
    Duroxide,
    /// Restate through `restate-sdk`.
    Restate,
    /// Temporal through `temporalio-sdk`. Its activities alone name the run: put `workflow.run_id` on the spans of workflows, or
    /// take the interceptor in `examples/temporal/src/tagging.rs`.
    Temporal,
    /// DBOS through `dbos`.
    Dbos,
    /// AWS Lambda's durable executions through `aws-durable-execution-sdk`.
    AwsDurable,
    /// Jobs of `underway`, which run step by step.
    Underway,
    /// Jobs of Graphile Worker through `graphile_worker`.
    GraphileWorker,
    /// Tasks of `apalis`. Its spans are at level DEBUG, unless it is told another one.
    Apalis,
    /// Jobs of Awa through `awa-worker`.
    Awa,
}

/// The names that an engine uses. Each is given as it was read in the engine's published source.
#[derive(Clone, Copy)]
pub(super) struct Preset {
    pub(super) instance_id: Option<FieldName>,
    pub(super) run_id: Option<&'static str>,
    pub(super) parent_instance_id: Option<&'static str>,
    /// Its terminal words are those of all engines (`value::EndStatus`).
    pub(super) status: Option<&'static str>,
    pub(super) replaying: Option<&'static str>,
    pub(super) replaying_children: Option<FieldName>,
    /// The targets of the spans on which the names of [`own`] count.
    pub(super) targets: &'static [&'static str],
    pub(super) id_form: Option<&'static IdForm>,
    /// Spans around user code without an instance id, which join the instance of their first child.
    pub(super) adopted: &'static [SpanName],
    /// Spans opened with `parent: None` that belong into the current one all the same.
    pub(super) nested: &'static [SpanName],
    /// Spans in which a process waits for work.
    pub(super) pollers: &'static [SpanName],
    /// Spans whose close is the end of their instance.
    pub(super) completing: &'static [SpanName],
}

/// A span by its name and target.
pub(super) type SpanName = (&'static str, &'static str);

#[derive(Clone, Copy)]
pub(super) struct FieldName {
    pub(super) name: &'static str,
    /// Counts on spans of the engine's own targets alone.
    pub(super) is_own: bool,
}

/// A name that nobody but the engine uses.
const fn anywhere(name: &'static str) -> Option<FieldName> {
    let is_own = false;
    Some(FieldName { name, is_own })
}

/// A common word.
const fn own(name: &'static str) -> Option<FieldName> {
    let is_own = true;
    Some(FieldName { name, is_own })
}

const NOTHING: Preset = Preset {
    instance_id: None,
    run_id: None,
    parent_instance_id: None,
    status: None,
    replaying: None,
    replaying_children: None,
    targets: &[],
    id_form: None,
    adopted: &[],
    nested: &[],
    pollers: &[],
    completing: &[],
};

impl Engine {
    pub(super) const fn preset(self) -> Preset {
        match self {
            // dapr-durabletask 0.0.4, src/internal/otel.rs:130-186: the raw OpenTelemetry spans of its feature
            // `opentelemetry` carry the id from their start, and have good parents where the sidecar hands the
            // context on. They tell the status of the workflow on its last turn
            // (src/worker/orchestration_executor.rs:105-111): COMPLETED, FAILED, TERMINATED, or CONTINUED_AS_NEW, which
            // is no end.
            Self::Dapr => Preset {
                instance_id: anywhere("durabletask.task.instance_id"),
                status: Some("durabletask.runtime_status"),
                ..NOTHING
            },
            // duroxide 0.1.32 opens no spans; its events say `instance_id`, and so do spans of other libraries.
            Self::Duroxide => NOTHING,
            // restate-sdk 0.13.0, src/endpoint/mod.rs:595: one span around each attempt. Its
            // `restate.sdk.is_replaying` is no replay field, since the attempt that begins with a replay goes on to do
            // new work. Nor does it tell of the children: src/endpoint/context.rs:69 records the flag on whatever span is
            // current. That may be the user's, which does not declare the field, and then the engine's span would never
            // see `false`, and real spans be lost.
            Self::Restate => Preset {
                adopted: &[("restate_sdk_endpoint_handle", "restate_sdk::endpoint")],
                ..NOTHING
            },
            // temporalio-sdk 1.1.1: `RunActivity` (src/lib.rs:1506) records both ids within its first poll;
            // `RunWorkflow` (src/workflow_future.rs:75), entered around each poll of user code, has none. No
            // field tells of a replay, and a poll that begins with one goes on to do new work.
            Self::Temporal => Preset {
                instance_id: anywhere("temporalWorkflowID"),
                run_id: Some("temporalRunID"),
                adopted: &[("RunWorkflow", "temporalio_sdk::workflow_future")],
                ..NOTHING
            },
            // dbos 0.5.0: `workflow` (src/workflow.rs:1722) is open around a whole execution, a recovery being the next
            // one, and is created in the span of whoever starts it: a caller's, the parent workflow's, or the endless
            // `queue` of each queue (src/dequeue.rs:206) and `queues` of them all (src/dequeue.rs:163). `step`
            // (src/step.rs:430) opens inside it, and names no workflow. A child names no parent.
            Self::Dbos => Preset {
                instance_id: own("workflow_id"),
                targets: &["dbos::workflow"],
                pollers: &[("queues", "dbos::dequeue"), ("queue", "dbos::dequeue")],
                completing: &[("workflow", "dbos::workflow")],
                ..NOTHING
            },
            // aws-durable-execution-sdk 0.1.0, names in src/observability.rs: `durable_execution` and
            // `durable_operation` (src/tracing_layer.rs:100-170) carry the ARN. `isReplay` is recorded on the former after
            // each operation is claimed (src/context.rs:390 and 551), on a handle the SDK keeps for that, so `false` is
            // sure to be seen; the span itself is new in each invocation. Child contexts have one of their own with
            // `parent: None` (src/tracing_layer.rs:163), so that a log filter judges each by its own flag: this crate does
            // that in any case, and nests it where it was created. Around them lambda_runtime opens
            // `Lambda runtime invoke` (1.0.1, src/layers/trace.rs:60-68; 1.5.0, lines 66-88), which names a request only; its
            // layer for OpenTelemetry opens `Lambda function invocation` instead (1.0.1, src/layers/otel.rs:75; 1.5.0, lines
            // 76 and 87), exported under the name of the function.
            Self::AwsDurable => Preset {
                instance_id: anywhere("executionArn"),
                replaying_children: own("isReplay"),
                targets: &["aws_durable_execution_sdk::tracing_layer"],
                adopted: &[
                    ("Lambda runtime invoke", "lambda_runtime::layers::trace"),
                    ("Lambda function invocation", "lambda_runtime::layers::otel"),
                ],
                nested: &[(
                    "durable_execution",
                    "aws_durable_execution_sdk::tracing_layer",
                )],
                ..NOTHING
            },
            // underway 0.2.0: `execute` (src/job.rs:1624) runs one attempt at one step. Around it, on a task of its own,
            // is `process_next_task` (src/worker.rs:719), opened for each look into the queue.
            Self::Underway => Preset {
                instance_id: own("job.id"),
                targets: &["underway::job"],
                id_form: Some(&IdForm {
                    prefix: "underway",
                    queue: None,
                }),
                pollers: &[("process_next_task", "underway::worker")],
                ..NOTHING
            },
            // graphile_worker 0.14.0: `run_job` (src/runner/task_execution.rs:35) runs one attempt. The ids are one sequence
            // for all queues, and the span names none. It stays `run_job`, since its `otel.name` is recorded after its start.
            Self::GraphileWorker => Preset {
                instance_id: own("job_id"),
                targets: &["graphile_worker::runner::task_execution"],
                id_form: Some(&IdForm {
                    prefix: "graphile",
                    queue: None,
                }),
                ..NOTHING
            },
            // apalis 1.0.0: `task` is one attempt, by either of two ways to make it (src/layers/tracing/make_span.rs:79,
            // src/layers/tracing/contextual_span.rs:61). No queue is named.
            Self::Apalis => Preset {
                instance_id: own("task_id"),
                targets: &[
                    "apalis::layers::tracing::make_span",
                    "apalis::layers::tracing::contextual_span",
                ],
                id_form: Some(&IdForm {
                    prefix: "apalis",
                    queue: None,
                }),
                ..NOTHING
            },
            // awa-worker 0.6.0: `job.execute` (src/executor.rs:288) is one attempt, created inside `poll_once` of an endless
            // `run` for each queue (src/dispatcher.rs:354 and 501), which so is the parent of all jobs.
            Self::Awa => Preset {
                instance_id: own("job.id"),
                targets: &["awa_worker::executor"],
                id_form: Some(&IdForm {
                    prefix: "awa",
                    queue: Some("job.queue"),
                }),
                pollers: &[
                    ("run", "awa_worker::dispatcher"),
                    ("poll_once", "awa_worker::dispatcher"),
                ],
                ..NOTHING
            },
        }
    }
}
