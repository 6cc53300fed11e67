//! What loggers see: the current context without starting a span, and no events of replayed code.

use std::sync::{Arc, Mutex};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::field::{Empty, Field, Visit};
use tracing::{Event, Subscriber, info, info_span};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

use crate::support::*;

const ID: &str = "order-42";

/// A layer that logs the messages of events.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Message(String);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap().push(message.0);
    }
}

/// Runs code with a storage's layer and a logging layer, and returns what that has logged.
fn logged(run: impl FnOnce(&WorkflowContextStorage)) -> Vec<String> {
    let storage = WorkflowContextStorage::builder().replay_children_field("isReplay");
    let storage = storage.build().unwrap();
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let log = Log::default();
    let subscriber = tracing_subscriber::registry()
        .with(storage.layer(tracer))
        .with(log.clone().with_filter(storage.log_filter()));
    tracing::subscriber::with_default(subscriber, || run(&storage));
    log.0.lock().unwrap().clone()
}

#[test]
fn events_of_replayed_code_are_hidden_until_it_has_caught_up() {
    let logged = logged(|_| {
        info!("before");
        let turn =
            info_span!("turn", workflow.instance_id = ID, workflow.replaying = true).entered();
        info!("replayed");
        info_span!("step").in_scope(|| info!("replayed in a step"));
        info!(parent: None, "of no span");
        turn.record("workflow.replaying", false);
        info!("caught up");
        info_span!("step").in_scope(|| info!("new step"));
        drop(turn);
        info!("after");
    });
    assert_eq!(
        logged,
        ["before", "of no span", "caught up", "new step", "after"]
    );
}

#[test]
fn a_real_span_whose_children_are_replayed_logs_itself() {
    let logged = logged(|_| {
        let execution =
            info_span!("execution", workflow.instance_id = ID, isReplay = true).entered();
        info!("its own");
        info_span!("operation").in_scope(|| info!("replayed"));
        let real = info_span!("real", workflow.replaying = false).entered();
        info!("real within");
        drop(real);
        execution.record("isReplay", false);
        info_span!("operation").in_scope(|| info!("new"));
    });
    assert_eq!(logged, ["its own", "real within", "new"]);
}

#[test]
fn another_storage_hides_nothing() {
    let other = WorkflowContextStorage::new();
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let log = Log::default();
    let storage = WorkflowContextStorage::new();
    let subscriber = tracing_subscriber::registry()
        .with(storage.layer(tracer))
        .with(log.clone().with_filter(other.log_filter()));
    tracing::subscriber::with_default(subscriber, || {
        let _turn =
            info_span!("turn", workflow.instance_id = ID, workflow.replaying = true).entered();
        info!("replayed elsewhere");
    });
    assert_eq!(*log.0.lock().unwrap(), ["replayed elsewhere"]);
}

#[test]
fn to_peek_starts_no_held_span() {
    let worker = Worker::new();
    worker.run(|| {
        assert_eq!(WorkflowContext::peek(), None);
        let request = info_span!("request").entered();
        let in_request = WorkflowContext::current();
        let is_same = |one: &Option<WorkflowContext>, other: &Option<WorkflowContext>| {
            let ids =
                |cx: &Option<WorkflowContext>| cx.as_ref().map(|cx| (cx.trace_id(), cx.span_id()));
            one.is_some() && ids(one) == ids(other)
        };
        assert!(is_same(&WorkflowContext::peek(), &in_request));
        drop(request);

        let step = info_span!("step", workflow.instance_id = Empty).entered();
        assert_eq!(WorkflowContext::peek(), None, "it has no context yet");
        step.record("workflow.instance_id", ID);
        let peeked = WorkflowContext::peek();
        assert!(is_same(&peeked, &WorkflowContext::current()));
        assert!(is_same(&peeked, &worker.storage.get(ID).unwrap()));
    });
    // It was still held when its id came.
    assert_eq!(worker.storage.stats().late, 0);
    assert_eq!(worker.storage.stats().deferred, 1);
}

#[test]
fn a_span_entered_inside_a_held_one_can_be_peeked_at() {
    let worker = Worker::new();
    worker.run(|| {
        let other = info_span!("other");
        other.in_scope(|| ());
        let _step = info_span!("step", workflow.instance_id = Empty).entered();
        assert_eq!(WorkflowContext::peek(), None);
        let _other = other.enter();
        assert!(WorkflowContext::peek().is_some());
    });
}
