//! Derived ids, with durable roots: other languages compute the same, and what starts without a store meets in them.

use std::process::Command;

use tracing::info_span;

use super::{ID, builder};
use crate::support::*;

/// The derivation as the docs of `derived_trace_ids` describe it. Prints the trace id and the span id.
const PYTHON: &str = r#"
import hashlib, sys
namespace, instance, run, generation = sys.argv[1:]
digest = hashlib.sha256()
for part in ["tracing-workflow-context 1", namespace, instance, run, generation]:
    part = part.encode()
    digest.update(len(part).to_bytes(8, "little") + part)
digest = digest.hexdigest()
print(digest[:32], digest[32:48])
"#;

fn python(namespace: &str, instance: &str, run: &str, generation: u32) -> String {
    let generation = generation.to_string();
    let output = Command::new("python3")
        .args(["-c", PYTHON, namespace, instance, run, &generation])
        .env("PYTHONUTF8", "1")
        .output()
        .expect("python3 is installed");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout)
        .expect("hexadecimal digits")
        .trim()
        .to_owned()
}

/// Returns a worker that shares nothing with any other.
fn worker(namespace: &str) -> Worker {
    let storage = builder().derived_trace_ids(true).max_spans(2);
    super::worker(storage.namespace(namespace.to_owned()).build().unwrap())
}

fn recorded(worker: &Worker, id: &str) -> String {
    let context = worker.stored(id);
    format!("{} {}", context.trace_id(), context.span_id())
}

#[test]
fn python_derives_the_same_ids() {
    let instances = [ID, "a/b:{c}", "Bestellung Nr. 7 — größer", "日本語", "x\ny"];
    for namespace in ["", "orders", "mandant-ä"] {
        for (id, run) in instances
            .iter()
            .flat_map(|id| [(*id, ""), (*id, "1"), (*id, "läuft")])
        {
            let worker = worker(namespace);
            worker.run(|| match run {
                "" => info_span!("step", workflow.instance_id = id).in_scope(|| ()),
                run => info_span!("step", workflow.instance_id = id, workflow.run_id = run)
                    .in_scope(|| ()),
            });
            assert_eq!(
                recorded(&worker, id),
                python(namespace, id, run, 1),
                "{namespace:?}, {id:?}, {run:?}"
            );
        }
    }
}

#[test]
fn python_derives_the_ids_of_later_traces_of_a_run() {
    let worker = worker("orders");
    for generation in 1..4 {
        for _ in 0..2 {
            worker.run(|| info_span!("step", workflow.instance_id = ID).in_scope(|| ()));
        }
        assert_eq!(recorded(&worker, ID), python("orders", ID, "", generation));
    }
}

#[test]
fn an_agent_that_resumes_after_the_store_is_lost_lands_in_the_derived_trace() {
    let (before, after) = (worker("orders"), worker("orders"));
    before.run(|| info_span!("step", workflow.instance_id = ID).in_scope(|| ()));
    let root = before.stored(ID);
    let resumed = after.storage.create_resumed(ID, Some("Planner")).unwrap();
    assert_eq!(resumed.trace_id(), root.trace_id());
    let agent = after.span("Planner.ToolCallingWorkflow");
    assert_eq!(agent.parent_span_id, root.span_id());
    after.storage.complete(ID, "completed").unwrap();
    let own = after.spans().into_iter();
    let own: Vec<_> = own
        .filter(|span| span.span_context.span_id() == root.span_id())
        .collect();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].name, "Planner.ToolCallingWorkflow");
}
