//! Workers in Python, which read and write the same records with their own client: `tests/interop.py`.

use std::path::Path;
use std::process::Command;

use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

use super::{PARENT, Worker};

#[track_caller]
fn python(arguments: &[&str]) -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = directory.join("target/python-venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: scripts/setup makes it, with the clients of both servers",
        python.display()
    );
    let output = Command::new(python)
        .arg(directory.join("tests/interop.py"))
        .args(arguments)
        .output()
        .expect("Python can be run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout)
        .expect("text")
        .trim_end()
        .to_owned()
}

/// Asserts that Python reads from the server at a URL what a storage with the JSON form writes there.
pub(crate) fn assert_python_reads_a_context_recorded_by_a_span(
    url: &str,
    storage: WorkflowContextStorage,
) {
    let worker = Worker::with_storage(storage);
    worker.run(|| tracing::info_span!("step", workflow.instance_id = "order-42").in_scope(|| {}));
    worker.storage.flush().unwrap();
    let recorded = worker
        .storage
        .get("order-42")
        .unwrap()
        .expect("it is recorded");
    let read = python(&["read", url, "order-42"]);
    assert_eq!(read, format!("{} None False", recorded.traceparent()));

    let resumed = worker.storage.create_resumed("agent ü}", None).unwrap();
    worker.storage.flush().unwrap();
    let read = python(&["read", url, "agent ü}"]);
    assert_eq!(read, format!("{} None True", resumed.traceparent()));

    let with_state = WorkflowContext::parse(PARENT, "vendor=1,other=\"2\"").unwrap();
    worker.storage.store("order-43", with_state).unwrap();
    worker.storage.flush().unwrap();
    let read = python(&["read", url, "order-43"]);
    assert_eq!(read, format!("{PARENT} vendor=1,other=\"2\" False"));
}

/// Asserts that spans continue what Python writes.
pub(crate) fn assert_a_span_continues_a_context_recorded_by_python(
    url: &str,
    storage: WorkflowContextStorage,
) {
    let worker = Worker::with_storage(storage);
    for (id, tracestate, expiry) in [("order-42", "", "3600"), ("agent ü}", "vendor=1", "")] {
        python(&["write", url, id, PARENT, tracestate, expiry]);
        worker.run(|| tracing::info_span!("step", workflow.instance_id = %id).in_scope(|| {}));
        let span = worker.spans().pop().expect("a span");
        let parent = WorkflowContext::parse(PARENT, tracestate).unwrap();
        assert_eq!(span.span_context.trace_id(), parent.trace_id());
        assert_eq!(span.parent_span_id, parent.span_id());
        assert_eq!(span.span_context.trace_state().header(), tracestate);
        assert!(worker.storage.get(id).unwrap().expect("found").is_resumed());
    }
    assert_eq!(worker.storage.stats().malformed, 0);
}

/// Asserts that a record of either language is found by a claim of the other.
pub(crate) fn assert_the_first_writer_wins_in_either_language(
    url: &str,
    storage: WorkflowContextStorage,
) {
    let worker = Worker::with_storage(storage);
    worker.run(|| tracing::info_span!("step", workflow.instance_id = "ours").in_scope(|| {}));
    worker.storage.flush().unwrap();
    let ours = worker
        .storage
        .get("ours")
        .unwrap()
        .expect("recorded")
        .traceparent();
    assert_eq!(python(&["claim", url, "ours", PARENT]), ours);

    assert_eq!(python(&["claim", url, "theirs", PARENT]), PARENT);
    let theirs = worker.storage.get("theirs").unwrap().expect("found");
    assert_eq!(theirs.traceparent(), PARENT);
}
