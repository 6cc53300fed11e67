//! The presets: the fields and spans of each known engine, with the upstream source of every name.

/// A durable-workflow engine whose fields and spans are known: a preset for the builder.
///
/// | engine | instance id | run id | status | engine spans that are held |
/// |---|---|---|---|---|
/// | `Dapr` | `durabletask.task.instance_id` | | `durabletask.runtime_status` | |
/// | `Duroxide` | | | | |
/// | `Restate` | | | | `restate_sdk_endpoint_handle` |
/// | `Temporal` | `temporalWorkflowID` | `temporalRunID` | | `RunWorkflow` |
///
/// None has a replay field: an engine that reports a replay at all goes on to new work in the same span, and none is sure to
/// say so there. None reads a common word, which spans that are not the engine's may use too.
/// The reserved fields of this crate keep their meaning beside them.
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
    /// Temporal through `temporalio-sdk`.
    Temporal,
}

/// The names that an engine uses.
pub(super) struct Preset {
    pub(super) instance_id: Option<&'static str>,
    pub(super) run_id: Option<&'static str>,
    pub(super) status: Option<&'static str>,
    /// Name and target of a span that the engine opens around user code without an instance id.
    pub(super) span: Option<(&'static str, &'static str)>,
}

impl Engine {
    pub(super) fn preset(self) -> Preset {
        match self {
            // dapr-durabletask 0.0.4, src/internal/otel.rs:130-186: the raw OpenTelemetry spans of its feature
            // `opentelemetry` carry the id from their start, and have good parents where the sidecar hands the
            // context on. They tell the status of the workflow on its last turn.
            Self::Dapr => Preset {
                instance_id: Some("durabletask.task.instance_id"),
                run_id: None,
                status: Some("durabletask.runtime_status"),
                span: None,
            },
            // duroxide 0.1.32 opens no spans; its events say `instance_id`, and so do spans of other libraries.
            Self::Duroxide => Preset {
                instance_id: None,
                run_id: None,
                status: None,
                span: None,
            },
            // restate-sdk 0.13.0, src/endpoint/mod.rs:595: one span around each attempt. Its
            // `restate.sdk.is_replaying` is no replay field, since the attempt that begins with a replay goes on to do
            // new work. Nor does it tell of the children: src/endpoint/context.rs:69 records the flag on whatever span is
            // current. That may be the user's, which does not declare the field, and then the engine's span would never
            // see `false`, and real spans be lost.
            Self::Restate => Preset {
                instance_id: None,
                run_id: None,
                status: None,
                span: Some(("restate_sdk_endpoint_handle", "restate_sdk::endpoint")),
            },
            // temporalio-sdk 1.1.1: `RunActivity` (src/lib.rs:1506) records both ids within its first poll;
            // `RunWorkflow` (src/workflow_future.rs:75), entered around each poll of user code, has none. No
            // field tells of a replay, and a poll that begins with one goes on to do new work.
            Self::Temporal => Preset {
                instance_id: Some("temporalWorkflowID"),
                run_id: Some("temporalRunID"),
                status: None,
                span: Some(("RunWorkflow", "temporalio_sdk::workflow_future")),
            },
        }
    }
}
