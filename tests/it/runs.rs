//! Runs of one instance id are kept apart, and child workflows are nested in their parents.

use std::collections::HashSet;
use std::sync::{Arc, Barrier};
use std::thread;

use crate::support::*;
use opentelemetry::trace::SpanContext;
use opentelemetry::{SpanId, TraceId};
use tracing::field::Empty;
use tracing::{Span, info_span};
use tracing_workflow_context::{Engine, WorkflowContextStorage};

const ID: &str = "order-42";
const CHILD_ID: &str = "order-42/shipping";

/// How many runs beside the latest are kept for their late spans.
const OLDER_RUNS: usize = 8;

fn run(run_id: &str) -> Tags<'_> {
    Tags::instance(ID).run(run_id)
}

fn child() -> Tags<'static> {
    Tags::instance(CHILD_ID).child_of(ID)
}

/// Returns the expected links: one of that relation to that span.
fn link_to(relation: &str, span: &SpanContext) -> Vec<(String, (TraceId, SpanId))> {
    vec![(relation.to_owned(), ids(span))]
}

// Runs.

#[test]
fn continue_as_new_opens_a_linked_trace_for_each_run_and_not_one_unbounded_trace() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let runs = ["run-1", "run-2", "run-3"];
        for run_id in runs {
            for step in ["charge", "ship"] {
                worker.step(&format!("{step} {run_id}"), run(run_id));
            }
        }
        let mut last_run = None;
        for run_id in runs {
            let first = worker.span(&format!("charge {run_id}"));
            assert_root(&first);
            assert_eq!(
                links(&first),
                last_run.map_or(vec![], |last| link_to("new_run", &last))
            );
            assert_continues(&worker.span(&format!("ship {run_id}")), &first.span_context);
            last_run = Some(first.span_context);
        }
        assert_eq!(worker.forest().trace_count(), runs.len());
        assert_eq!(worker.storage.stats().stored_instances, 1);
    });
}

#[test]
fn a_restart_of_the_same_id_merges_with_its_own_run_only() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("started", run("run-1"));
        let crashed_and_restarted = Worker::via(worker.made_via(), worker.storage.clone());
        crashed_and_restarted.step("same run", run("run-1"));
        crashed_and_restarted.step("id used again", run("run-2"));

        let started = worker.span("started").span_context;
        assert_continues(&crashed_and_restarted.span("same run"), &started);
        let again = crashed_and_restarted.span("id used again");
        assert_root(&again);
        assert_eq!(links(&again), link_to("new_run", &started));
    });
}

#[test]
fn a_request_that_starts_a_new_run_does_not_become_its_parent() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("run-1", run("run-1"));
        worker.within("request", UNTAGGED, || worker.step("run-2", run("run-2")));

        let run_2 = worker.span("run-2");
        assert_root(&run_2);
        assert_ne!(run_2.span_context.trace_id(), worker.trace_of("request"));
        assert_eq!(
            links(&run_2),
            [
                link_to("new_run", &worker.span("run-1").span_context),
                link_to("foreign", &worker.span("request").span_context),
            ]
            .concat()
        );
    });
}

#[test]
fn late_spans_of_an_old_run_find_their_own_runs_context_wherever_they_open() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("run-1", run("run-1"));
        worker.step("run-2", run("run-2"));
        let (run_1, run_2) = (
            worker.span("run-1").span_context,
            worker.span("run-2").span_context,
        );

        worker.step_elsewhere("late", run("run-1"));
        worker.within("poll", UNTAGGED, || worker.step("late poll", run("run-1")));
        worker.within("in run-2", run("run-2"), || {
            worker.step("late nested", run("run-1"))
        });

        assert_continues(&worker.span("late"), &run_1);
        let late = worker.span("late poll");
        assert_continues(&late, &run_1);
        let poll = worker.span("poll").span_context;
        assert_eq!(links(&late), link_to("foreign", &poll));
        // Local nesting wins, in whichever run of the instance.
        assert_nested(&worker.span("late nested"), &worker.span("in run-2"));
        assert_continues(&worker.span("in run-2"), &run_2);
        assert_eq!(
            ids(&worker.stored(ID)),
            ids(&run_2),
            "a late span took over"
        );
    });
}

#[test]
fn a_span_without_a_run_id_belongs_to_the_latest_run() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("run-1", run("run-1"));
        worker.step("in run-1", Tags::instance(ID));
        worker.step("run-2", run("run-2"));
        worker.step("late", run("run-1"));
        worker.step("in run-2", Tags::instance(ID));
        worker.step("empty run id", run(""));

        assert_continues(&worker.span("in run-1"), &worker.span("run-1").span_context);
        let run_2 = worker.span("run-2").span_context;
        assert_continues(&worker.span("in run-2"), &run_2);
        assert_continues(&worker.span("empty run id"), &run_2);
        assert_eq!(ids(&worker.stored(ID)), ids(&run_2));
    });
}

#[test]
fn a_context_without_a_run_id_is_joined_by_the_first_run_and_by_no_other() {
    let recorded_by_a_span = |worker: &Worker| worker.step("other", Tags::instance(ID));
    let stored_by_a_call = |worker: &Worker| {
        worker.step("other", Tags::instance("other"));
        let context = worker
            .storage
            .get("other")
            .expect("a valid id")
            .expect("recorded");
        worker.step("forgotten", run("forgotten"));
        worker.storage.store(ID, context).expect("a valid id");
    };
    for (label, store) in [
        (
            "recorded by a span",
            &recorded_by_a_span as &dyn Fn(&Worker),
        ),
        ("stored by a call", &stored_by_a_call),
    ] {
        let test = |worker: &Worker| {
            store(worker);
            worker.step("run-1", run("run-1"));
            worker.step("run-2", run("run-2"));
            worker.step("late", run("run-1"));

            let stored = worker.span("other").span_context;
            assert_continues(&worker.span("run-1"), &stored);
            assert_root(&worker.span("run-2"));
            assert_eq!(links(&worker.span("run-2")), link_to("new_run", &stored));
            assert_continues(&worker.span("late"), &stored);
        };
        labelled(label, || for_each_worker(WorkflowContextStorage::new, test));
    }
}

#[test]
fn the_latest_run_and_eight_older_ones_are_kept() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let runs: Vec<_> = (0..100).map(|n| format!("run-{n}")).collect();
        for run_id in &runs {
            worker.step(run_id, run(run_id));
        }
        let (forgotten, kept) = runs.split_at(runs.len() - OLDER_RUNS - 1);
        for run_id in kept {
            let late = format!("late {run_id}");
            worker.step(&late, run(run_id));
            assert_continues(&worker.span(&late), &worker.span(run_id).span_context);
        }
        assert_eq!(worker.storage.stats().stored_instances, 1);

        // A forgotten run counts as new, and displaces the oldest.
        let (latest, pushed_out) = (kept.last().unwrap(), kept.first().unwrap());
        let mut last_run = worker.span(latest).span_context;
        for run_id in [forgotten.last().unwrap(), pushed_out] {
            let again = format!("again {run_id}");
            worker.step(&again, run(run_id));
            let again = worker.span(&again);
            assert_root(&again);
            assert_eq!(links(&again), link_to("new_run", &last_run));
            last_run = again.span_context;
        }
        assert!(worker.storage.cleanup(ID).expect("a valid id"));
        worker.step("after cleanup", run(latest));
        let after = worker.span("after cleanup");
        assert_root(&after);
        assert_eq!(links(&after), []);
    });
}

#[test]
fn two_threads_that_start_the_same_run_agree_on_one_trace() {
    for_each_via(|via| {
        // The sampler lets both threads see that the run is new before either has recorded it.
        let both_are_starting = Arc::new(Rendezvous::default());
        let sampler = Hooked(move |name: &str| {
            if name.starts_with("racer") {
                both_are_starting.wait_for(2);
            }
        });
        let worker = Worker::via_with_sampler(via, WorkflowContextStorage::new(), sampler);
        worker.step("run-1", run("run-1"));
        thread::scope(|scope| {
            for racer in ["racer 1", "racer 2"] {
                let worker = &worker;
                scope.spawn(move || worker.step(racer, run("run-2")));
            }
        });
        worker.step("later", run("run-2"));

        let run_1 = worker.span("run-1").span_context;
        let racers = [worker.span("racer 1"), worker.span("racer 2")];
        let stored = ids(&worker.stored(ID));
        let (winners, losers): (Vec<_>, Vec<_>) = racers
            .iter()
            .partition(|racer| ids(&racer.span_context) == stored);
        let ([winner], [loser]) = (&winners[..], &losers[..]) else {
            panic!("{} racers were recorded, made via {via:?}", winners.len());
        };
        assert_root(winner);
        assert_eq!(links(winner), link_to("new_run", &run_1));
        let to_winner = link_to("late", &winner.span_context);
        assert_eq!(
            links(loser),
            [link_to("new_run", &run_1), to_winner].concat()
        );
        assert_continues(&worker.span("later"), &winner.span_context);
        assert_eq!(worker.storage.stats().conflicts, 1);
    });
}

#[test]
fn many_threads_that_start_many_runs_agree_on_one_trace_for_each() {
    const THREADS: usize = 8;
    const RUNS: usize = 200;
    let worker = Worker::via(Via::Api, WorkflowContextStorage::new());
    let started = Barrier::new(THREADS);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for n in 0..RUNS {
                    let run_id = n.to_string();
                    started.wait();
                    worker.step("racer", run(&run_id));
                    // Every racer has ended, and the run is the latest.
                    started.wait();
                    worker.step(&run_id, run(&run_id));
                }
            });
        }
    });
    let spans = worker.spans();
    for n in 0..RUNS {
        let run_id = n.to_string();
        let of_run = spans.iter().filter(|span| span.name == run_id);
        let parents: HashSet<_> = of_run.map(|span| span.parent_span_id).collect();
        assert_eq!(parents.len(), 1, "the parents of run {run_id}");
    }
    let lost = spans
        .iter()
        .filter(|span| links(span).iter().any(|(relation, _)| relation == "late"));
    assert_eq!(lost.count() as u64, worker.storage.stats().conflicts);
}

#[test]
fn a_new_run_nested_in_the_old_ones_trace_keeps_its_parent_and_is_recorded() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.within("run-1", run("run-1"), || {
            worker.within("continue as new", UNTAGGED, || {
                worker.step("run-2", run("run-2"))
            });
        });
        worker.step("later", run("run-2"));
        worker.step("latest", Tags::instance(ID));
        worker.step("late", run("run-1"));

        let nested = worker.span("run-2");
        assert_nested(&nested, &worker.span("continue as new"));
        assert_eq!(links(&nested), []);
        for name in ["later", "latest"] {
            assert_continues(&worker.span(name), &nested.span_context);
        }
        assert_continues(&worker.span("late"), &worker.span("run-1").span_context);
    });
}

#[test]
fn a_context_that_is_stored_replaces_all_runs() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("run-1", run("run-1"));
        worker.step("run-2", run("run-2"));
        worker.step("other", Tags::instance("other"));
        let context = worker
            .storage
            .get("other")
            .expect("a valid id")
            .expect("recorded");
        worker.storage.store(ID, context).expect("a valid id");
        worker.step("joins", run("run-1"));

        assert_continues(&worker.span("joins"), &worker.span("other").span_context);
    });
}

#[test]
fn a_run_id_is_its_formatted_value() {
    let worker = Worker::new();
    worker.run(|| {
        let id = ID;
        let as_text = "7";
        drop(info_span!("text", workflow.instance_id = id, workflow.run_id = as_text).entered());
        drop(
            info_span!("display", workflow.instance_id = id, workflow.run_id = %as_text).entered(),
        );
        drop(info_span!("debug", workflow.instance_id = id, workflow.run_id = ?as_text).entered());
        drop(info_span!("integer", workflow.instance_id = id, workflow.run_id = 7).entered());
        drop(info_span!("empty", workflow.instance_id = id, workflow.run_id = "").entered());
    });
    let text = worker.span("text").span_context;
    for name in ["display", "debug", "integer", "empty"] {
        assert_continues(&worker.span(name), &text);
    }
}

#[test]
fn a_span_that_is_held_for_its_instance_id_joins_the_run_that_it_names() {
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            for (name, run_id) in [("run-1", "run-1"), ("run-2", "run-2"), ("late", "run-1")] {
                let span = info_span!(
                    "run id is known",
                    otel.name = name,
                    workflow.instance_id = Empty,
                    workflow.run_id = run_id
                );
                span.in_scope(|| record(&span, "workflow.instance_id", ID));
            }
            let both = info_span!(
                "both",
                workflow.instance_id = Empty,
                workflow.run_id = Empty
            );
            both.in_scope(|| {
                record(&both, "workflow.run_id", "run-1");
                record(&both, "workflow.instance_id", ID);
            });
        });
        let run_1 = worker.span("run-1").span_context;
        assert_eq!(links(&worker.span("run-2")), link_to("new_run", &run_1));
        assert_continues(&worker.span("late"), &run_1);
        assert_continues(&worker.span("both"), &run_1);
    }
}

#[test]
fn temporal_activities_which_record_their_workflow_id_and_then_their_run_id_join_their_run() {
    let make = || {
        let builder = WorkflowContextStorage::builder().engine(Engine::Temporal);
        builder.build().expect("a valid setting")
    };
    for worker in both_activations(make) {
        worker.run(|| {
            for (name, run_id) in [("run-1", "run-1"), ("run-2", "run-2"), ("late", "run-1")] {
                // As temporalio-sdk 1.1 does.
                let activity = info_span!(
                    "RunActivity",
                    otel.name = name,
                    temporalWorkflowID = Empty,
                    temporalRunID = Empty
                );
                activity.in_scope(|| {
                    record(&activity, "temporalWorkflowID", ID);
                    record(&activity, "temporalRunID", run_id);
                    drop(info_span!("activity's own").entered());
                });
            }
        });
        let run_1 = worker.span("run-1").span_context;
        assert_eq!(links(&worker.span("run-2")), link_to("new_run", &run_1));
        assert_continues(&worker.span("late"), &run_1);
    }
}

#[test]
fn a_started_span_whose_id_is_recorded_late_is_linked_to_its_run() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("run-1", run("run-1"));
        worker.step("run-2", run("run-2"));
        let late = worker.open("late", Tags::awaiting_id().run("run-1"));
        late.inside(|| ());
        late.start();
        late.record_instance_id(ID);
        drop(late);

        assert_eq!(worker.storage.stats().late, 1);
        assert_eq!(
            links(&worker.span("late")),
            link_to("late", &worker.span("run-1").span_context)
        );
    });
}

fn record(span: &Span, field: &str, value: &str) {
    span.record(field, value);
}

// Children.

#[test]
fn child_workflows_join_their_parents_trace() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("parent", Tags::instance(ID));
        // As a rule another worker runs the child.
        worker.step_elsewhere("child", child());
        worker.step_elsewhere("child's activity", Tags::instance(CHILD_ID));
        worker.step("parent's activity", Tags::instance(ID));

        let (parent, first) = (worker.span("parent").span_context, worker.span("child"));
        assert_continues(&first, &parent);
        assert_eq!(links(&first), []);
        assert_continues(&worker.span("child's activity"), &first.span_context);
        assert_continues(&worker.span("parent's activity"), &parent);
        assert_eq!(ids(&worker.stored(CHILD_ID)), ids(&first.span_context));
        assert_eq!(ids(&worker.stored(ID)), ids(&parent));
        worker.forest().assert_one_trace().assert_no_orphans();
    });
}

#[test]
fn a_child_that_a_poller_starts_joins_its_parents_trace_and_is_linked_to_the_poller() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("parent", Tags::instance(ID));
        worker.within("poll", UNTAGGED, || worker.step("child", child()));
        {
            let _headers = remote_context(0xf0, 0xf1).attach();
            worker.step("called", Tags::instance("called").child_of(ID));
        }
        let parent = worker.span("parent").span_context;
        for (name, natural) in [
            ("child", worker.span("poll").span_context),
            ("called", remote(0xf0, 0xf1)),
        ] {
            assert_continues(&worker.span(name), &parent);
            assert_eq!(links(&worker.span(name)), link_to("child", &natural));
        }
    });
}

#[test]
fn a_child_nested_in_its_parents_trace_keeps_its_parent() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.within("parent", Tags::instance(ID), || {
            worker.within("schedule", UNTAGGED, || worker.step("child", child()));
        });
        worker.step("child's activity", Tags::instance(CHILD_ID));

        assert_nested(&worker.span("child"), &worker.span("schedule"));
        assert_eq!(links(&worker.span("child")), []);
        assert_continues(
            &worker.span("child's activity"),
            &worker.span("child").span_context,
        );
    });
}

#[test]
fn a_child_of_an_unknown_parent_is_the_first_span_of_its_own_trace() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("child", child());
        worker.within("poll", UNTAGGED, || {
            worker.step("polled", Tags::instance("polled").child_of(ID))
        });
        worker.step(
            "own parent",
            Tags::instance("own parent").child_of("own parent"),
        );
        worker.step("empty parent", Tags::instance("empty parent").child_of(""));

        for name in ["child", "own parent", "empty parent"] {
            assert_root(&worker.span(name));
            assert_eq!(links(&worker.span(name)), []);
        }
        assert_nested(&worker.span("polled"), &worker.span("poll"));
        assert_eq!(links(&worker.span("polled")), []);
        assert_eq!(
            ids(&worker.stored(CHILD_ID)),
            ids(&worker.span("child").span_context)
        );
        assert_eq!(
            worker.storage.get(ID).expect("a valid id"),
            None,
            "the parent was recorded"
        );
    });
}

#[test]
fn only_the_first_span_of_a_child_looks_up_the_parent_instance() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("child", child());
        worker.step("parent", Tags::instance(ID));
        worker.step("tagged again", child());
        worker.step("other parent", Tags::instance(CHILD_ID).child_of("other"));

        let first = worker.span("child").span_context;
        for name in ["tagged again", "other parent"] {
            assert_continues(&worker.span(name), &first);
            assert_eq!(links(&worker.span(name)), []);
        }
    });
}

#[test]
fn a_child_joins_the_latest_run_of_its_parent() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("run-1", run("run-1"));
        worker.step("run-2", run("run-2"));
        worker.step("child", child().run("child-run-1"));

        assert_continues(&worker.span("child"), &worker.span("run-2").span_context);
    });
}

#[test]
fn a_new_run_of_a_child_is_a_new_run_and_not_a_child_again() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.step("parent", Tags::instance(ID));
        worker.step("child-run-1", child().run("child-run-1"));
        worker.step("child-run-2", child().run("child-run-2"));

        let again = worker.span("child-run-2");
        assert_root(&again);
        assert_eq!(
            links(&again),
            link_to("new_run", &worker.span("child-run-1").span_context)
        );
    });
}

#[test]
fn children_of_children_are_in_one_trace() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let names: Vec<_> = (0..20).map(|depth| depth.to_string()).collect();
        worker.step(&names[0], Tags::instance(&names[0]));
        for pair in names.windows(2) {
            worker.step(&pair[1], Tags::instance(&pair[1]).child_of(&pair[0]));
            assert_continues(&worker.span(&pair[1]), &worker.span(&pair[0]).span_context);
        }
        worker.forest().assert_one_trace().assert_no_orphans();
    });
}

#[test]
fn an_engine_span_that_is_adopted_by_a_child_workflow_joins_the_parents_trace_with_it() {
    let make = || {
        let builder = WorkflowContextStorage::builder().adopt_spans(["engine"]);
        builder.build().expect("a valid setting")
    };
    for worker in both_activations(make) {
        worker.run(|| {
            let (id, child_id) = (ID, CHILD_ID);
            info_span!("engine").in_scope(|| {
                drop(info_span!("parent", workflow.instance_id = id).entered());
            });
            info_span!("engine").in_scope(|| {
                let child = info_span!(
                    "child",
                    workflow.instance_id = child_id,
                    workflow.parent_instance_id = id
                );
                drop(child.entered());
            });
        });
        assert_eq!(worker.storage.stats().adopted, 2);
        worker.forest().assert_one_trace().assert_no_orphans();
    }
}

#[test]
fn run_and_parent_ids_may_have_other_fields() {
    let make = || {
        let builder = WorkflowContextStorage::builder()
            .run_id_fields(["attempt", "order.run"])
            .parent_instance_id_fields(["order.parent"]);
        builder.build().unwrap()
    };
    everywhere(make, |worker, place| {
        worker.run_in(place, || {
            info_span!("first", workflow.instance_id = "order", attempt = 1).in_scope(|| {});
            info_span!("second", workflow.instance_id = "order", order.run = "2").in_scope(|| {});
            info_span!("late", workflow.instance_id = "order", order.run = "1").in_scope(|| {});
            info_span!(
                "same",
                workflow.instance_id = "order",
                workflow.run_id = "3"
            )
            .in_scope(|| {});
            info_span!("child", workflow.instance_id = "c", order.parent = "order").in_scope(|| {});
            info_span!(
                "alone",
                workflow.instance_id = "a",
                workflow.parent_instance_id = "order"
            )
            .in_scope(|| {});
        });

        let (first, second) = (worker.span("first"), worker.span("second"));
        assert_ne!(worker.trace_of("first"), worker.trace_of("second"));
        assert_continues(&worker.span("late"), &first.span_context);
        assert_continues(&worker.span("same"), &second.span_context);
        assert_continues(&worker.span("child"), &second.span_context);
        assert_root(&worker.span("alone"));
    });
}
