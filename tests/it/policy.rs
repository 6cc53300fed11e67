//! Every relation is continued as configured, and invalid settings are refused with an explanation.

use std::time::Duration;

use crate::support::*;
use opentelemetry::Value;
use opentelemetry::trace::SpanContext;
use opentelemetry_sdk::trace::Sampler;
use tracing_workflow_context::{
    BuildError, Continuation, Engine, Relation, WorkflowContext, WorkflowContextStorage,
    WorkflowContextStorageBuilder,
};

const ID: &str = "order-42";
const PARENT_ID: &str = "parent-of-order-42";

/// All relations, with the default continuation of each.
const RELATIONS: [(Relation, Continuation); 8] = [
    (Relation::Orphan, Continuation::Parent),
    (Relation::SameTrace, Continuation::Keep),
    (Relation::Foreign, Continuation::ParentAndLink),
    (Relation::Resumed, Continuation::ParentAndLink),
    (Relation::Child, Continuation::ParentAndLink),
    (Relation::NewRun, Continuation::NewRootAndLink),
    (Relation::Late, Continuation::Link),
    (Relation::Expired, Continuation::NewRootAndLink),
];

const CONTINUATIONS: [Continuation; 6] = [
    Continuation::Keep,
    Continuation::Parent,
    Continuation::Link,
    Continuation::ParentAndLink,
    Continuation::NewRoot,
    Continuation::NewRootAndLink,
];

#[test]
fn each_relation_is_continued_as_configured() {
    for (relation, _) in RELATIONS {
        for continuation in CONTINUATIONS {
            let builder = || builder_for(relation).relation(relation, continuation);
            match builder().build() {
                Ok(_) => assert_continued(relation, continuation, builder),
                Err(refusal) => assert_impossible(relation, continuation, &refusal),
            }
        }
    }
}

#[test]
fn each_relation_is_continued_by_default_as_the_table_says() {
    for (relation, continuation) in RELATIONS {
        assert_continued(relation, continuation, || builder_for(relation));
    }
}

/// The parent that the span under test would have without this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Natural {
    None,
    /// `parent: None`, inside another span.
    ExplicitNone,
    Local,
    Remote,
}

const UNRELATED_TRACE: u128 = 0xf0;

fn naturals(relation: Relation) -> &'static [Natural] {
    use Natural::{ExplicitNone, Local, None, Remote};
    match relation {
        Relation::Orphan => &[None, ExplicitNone],
        Relation::SameTrace | Relation::Foreign => &[Local, Remote],
        _ => &[None, Local, Remote],
    }
}

fn builder_for(relation: Relation) -> WorkflowContextStorageBuilder {
    match relation {
        Relation::Expired => WorkflowContextStorage::builder().max_spans(1),
        _ => WorkflowContextStorage::builder(),
    }
}

fn assert_continued(
    relation: Relation,
    continuation: Continuation,
    builder: impl Fn() -> WorkflowContextStorageBuilder,
) {
    for &natural in naturals(relation) {
        let label = format!("{relation:?} x {continuation:?}, natural parent: {natural:?}");
        labelled(&label, || {
            for_each_worker(
                || builder().build().expect("a possible pair"),
                |worker| {
                    let facts = enact(worker, relation, natural);
                    expect(worker, relation, continuation, &facts);
                },
            );
        });
    }
}

#[track_caller]
fn assert_impossible(relation: Relation, continuation: Continuation, refusal: &BuildError) {
    let kept = [Continuation::Keep, Continuation::Link];
    assert_eq!(relation, Relation::Late, "{refusal}");
    assert!(!kept.contains(&continuation), "{refusal}");
    assert_eq!(
        refusal.to_string(),
        format!(
            "relation: Late cannot be continued with {continuation:?}: \
             the parent of a span that has started can no longer change, only Keep and Link are left"
        )
    );
}

struct Facts {
    natural: Option<SpanContext>,
    stored: SpanContext,
    subject: SpanContext,
}

/// Opens a span named `subject` in that relation, with that natural parent.
fn enact(worker: &Worker, relation: Relation, natural: Natural) -> Facts {
    enact_beside(worker, relation, natural, store(worker, relation))
}

fn enact_beside(worker: &Worker, relation: Relation, natural: Natural, stored: Stored) -> Facts {
    let Stored {
        first,
        context: stored,
    } = stored;
    let open = || open_subject(worker, relation);
    let (natural, subject) = match natural {
        Natural::None => (None, open()),
        Natural::ExplicitNone => worker.within("around", UNTAGGED, || {
            let subject = worker.open_root("subject", ID);
            subject.inside(|| ());
            (None, subject.span_context())
        }),
        Natural::Local => {
            // The stored span is still open, and may be the root of the natural parent's trace.
            let _root = first
                .as_ref()
                .filter(|_| relation == Relation::SameTrace)
                .map(Opened::enter);
            let natural = worker.open("natural", UNTAGGED);
            let subject = natural.inside(open);
            (Some(natural.span_context()), subject)
        }
        Natural::Remote => {
            let trace = match relation {
                Relation::SameTrace => u128::from_be_bytes(stored.trace_id().to_bytes()),
                _ => UNRELATED_TRACE,
            };
            let _attached = remote_context(trace, 0xf1).attach();
            (Some(remote(trace, 0xf1)), open())
        }
    };
    Facts {
        natural,
        stored,
        subject,
    }
}

/// The stored context, and its span if that is still open.
struct Stored {
    first: Option<Opened>,
    context: SpanContext,
}

fn store(worker: &Worker, relation: Relation) -> Stored {
    let (id, tags) = match relation {
        Relation::Resumed => {
            let resumed = worker
                .storage
                .create_resumed(ID, None)
                .expect("a recording span");
            return Stored {
                first: None,
                context: span_context(&resumed),
            };
        }
        Relation::Child => (PARENT_ID, Tags::instance(PARENT_ID)),
        Relation::NewRun => (ID, Tags::instance(ID).run("run-1")),
        _ => (ID, Tags::instance(ID)),
    };
    let first = worker.open("stored", tags);
    first.inside(|| ());
    Stored {
        first: Some(first),
        context: worker.stored(id),
    }
}

/// Stores a context as if another process had recorded it.
fn store_from_elsewhere(worker: &Worker, flags: &str) -> Stored {
    let traceparent = format!("00-{:032x}-{:016x}-{flags}", 0xa0, 0xa1);
    let context = WorkflowContext::parse(&traceparent, "").expect("a valid traceparent");
    worker.storage.store(ID, context).expect("a valid id");
    Stored {
        first: None,
        context: worker.stored(ID),
    }
}

fn open_subject(worker: &Worker, relation: Relation) -> SpanContext {
    let tags = match relation {
        Relation::Child => Tags::instance(ID).child_of(PARENT_ID),
        Relation::NewRun => Tags::instance(ID).run("run-2"),
        Relation::Late => Tags::awaiting_id(),
        _ => Tags::instance(ID),
    };
    let subject = worker.open("subject", tags);
    subject.inside(|| ());
    let context = subject.span_context();
    if relation == Relation::Late {
        subject.record_instance_id(ID);
    }
    context
}

fn expect(worker: &Worker, relation: Relation, continuation: Continuation, facts: &Facts) {
    let Facts {
        natural, stored, ..
    } = facts;
    let (parent, link) = match continuation {
        Continuation::Keep => (natural.as_ref(), None),
        Continuation::Parent => (Some(stored), None),
        Continuation::Link => (natural.as_ref(), Some(stored)),
        Continuation::ParentAndLink => (Some(stored), natural.as_ref()),
        Continuation::NewRoot => (None, None),
        Continuation::NewRootAndLink => (None, Some(stored)),
        other => unreachable!("{other:?} is new"),
    };
    let subject = worker.span("subject");
    match parent {
        Some(parent) => assert_child_of(&subject, parent),
        None => {
            assert_root(&subject);
            let trace = subject.span_context.trace_id();
            let known = natural.iter().chain([stored]);
            assert!(
                known.into_iter().all(|known| known.trace_id() != trace),
                "not a new trace"
            );
        }
    }
    let link = link.map(|target| (relation.as_str().to_owned(), ids(target)));
    // A new run or generation keeps the request that it comes from.
    let is_new = matches!(relation, Relation::NewRun | Relation::Expired)
        && continuation == Continuation::NewRootAndLink;
    let request = natural.as_ref().filter(|_| is_new);
    let request = request.map(|request| ("foreign".to_owned(), ids(request)));
    assert_eq!(
        links(&subject),
        Vec::from_iter(link.into_iter().chain(request)),
        "the relation and the target of its links"
    );

    // The first span of a child, of a run and of a generation is recorded, any other does not change the stored context.
    let is_first = matches!(
        relation,
        Relation::Child | Relation::NewRun | Relation::Expired
    );
    let recorded = if is_first {
        &subject.span_context
    } else {
        stored
    };
    assert_eq!(
        ids(&worker.stored(ID)),
        ids(recorded),
        "the stored context afterwards"
    );
    assert_eq!(
        generation(&subject),
        (relation == Relation::Expired).then_some(2)
    );
    assert_eq!(
        worker.storage.stats().late,
        u64::from(relation == Relation::Late)
    );
}

#[test]
fn a_span_that_fits_several_relations_takes_the_first_row_of_the_table() {
    let every_relation_tells_itself_by_a_link = || {
        let builder = WorkflowContextStorage::builder().max_spans(2);
        let relations = RELATIONS.into_iter();
        let builder = relations.fold(builder, |b, (relation, _)| {
            b.relation(relation, Continuation::Link)
        });
        builder
            .build()
            .expect("a natural parent and a link can always be")
    };
    let relation_of = |worker: &Worker, name: &str| {
        let links = links(&worker.span(name));
        links
            .into_iter()
            .map(|(relation, _)| relation)
            .collect::<Vec<_>>()
    };
    for_each_worker(every_relation_tells_itself_by_a_link, |worker| {
        let first = worker.open("first", Tags::instance(ID).run("run-1"));
        first.inside(|| worker.step("nested", Tags::instance(ID)));
        worker.step("fills the trace", Tags::instance(ID));
        first.inside(|| {
            worker.step("nested in a full trace", Tags::instance(ID));
            worker.step("nested run", Tags::instance(ID).run("run-2"));
        });
        drop(first);
        assert_eq!(relation_of(worker, "nested"), ["same_trace"]);
        assert_eq!(
            relation_of(worker, "nested in a full trace"),
            ["same_trace"],
            "over expired"
        );
        assert_eq!(
            relation_of(worker, "nested run"),
            ["same_trace"],
            "over new_run"
        );

        worker.step("run-2", Tags::instance(ID).run("run-2"));
        worker.step("full run-2", Tags::instance(ID).run("run-2"));
        worker.step("run-3", Tags::instance(ID).run("run-3"));
        assert_eq!(relation_of(worker, "run-2"), ["orphan"]);
        assert_eq!(
            relation_of(worker, "full run-2"),
            ["expired"],
            "over orphan"
        );
        assert_eq!(relation_of(worker, "run-3"), ["new_run"], "over expired");

        let resumed = worker
            .storage
            .create_resumed("resumed", None)
            .expect("a recording span");
        let resumed_trace = u128::from_be_bytes(resumed.trace_id().to_bytes());
        let _foreign = remote_context(UNRELATED_TRACE, 0xf1).attach();
        worker.step("resumed run-1", Tags::instance("resumed").run("run-1"));
        {
            let _nested = remote_context(resumed_trace, 0xf2).attach();
            worker.step("nested in resumed", Tags::instance("resumed").run("run-1"));
        }
        worker.step("full resumed", Tags::instance("resumed").run("run-1"));
        worker
            .storage
            .create_resumed("again", None)
            .expect("a recording span");
        worker.step("resumed run-2", Tags::instance("again").run("run-2"));
        worker.step("resumed run-3", Tags::instance("again").run("run-3"));
        assert_eq!(
            relation_of(worker, "resumed run-1"),
            ["resumed"],
            "over foreign"
        );
        assert_eq!(
            relation_of(worker, "nested in resumed"),
            ["same_trace"],
            "over resumed"
        );
        assert_eq!(
            relation_of(worker, "full resumed"),
            ["expired"],
            "over resumed"
        );
        assert_eq!(relation_of(worker, "resumed run-2"), ["resumed"]);
        assert_eq!(
            relation_of(worker, "resumed run-3"),
            ["new_run"],
            "over resumed"
        );
    });
}

#[test]
fn a_late_id_inside_the_stored_trace_needs_no_link() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        worker.within("stored", Tags::instance(ID), || {
            open_subject(worker, Relation::Late)
        });

        assert_nested(&worker.span("subject"), &worker.span("stored"));
        assert_eq!(links(&worker.span("subject")), []);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn a_context_from_another_process_is_resumed_once_and_continued_as_local_afterwards() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let stored = store_from_elsewhere(worker, "01");
        worker.within("poll", UNTAGGED, || {
            worker.step("first here", Tags::instance(ID));
            worker.step("second here", Tags::instance(ID));
        });
        worker.step("third here", Tags::instance(ID));

        let natural = ids(&worker.span("poll").span_context);
        let [first, second, third] =
            ["first here", "second here", "third here"].map(|name| worker.span(name));
        for span in [&first, &second, &third] {
            assert_child_of(span, &stored.context);
        }
        assert_eq!(links(&first), [("resumed".to_owned(), natural)]);
        assert_eq!(links(&second), [("foreign".to_owned(), natural)]);
        assert_eq!(links(&third), []);
        assert_eq!(
            attribute(&first, "workflow.resumed"),
            Some(Value::Bool(true))
        );
        let Some(Value::F64(seconds)) = attribute(&first, "workflow.resumed_after") else {
            panic!(
                "the time since the context was recorded: {:?}",
                first.attributes
            );
        };
        assert!(seconds >= 0.0, "{seconds}");
        for later in [&second, &third] {
            assert_eq!(attribute(later, "workflow.resumed"), None);
            assert_eq!(attribute(later, "workflow.resumed_after"), None);
        }
    });
}

// Sampling.

/// The relations that can start a new trace.
const RESAMPLED: [Relation; 3] = [Relation::Resumed, Relation::NewRun, Relation::Expired];

/// Stores a context with that sampled flag, and opens a span while the sampler takes what it decides anew on, or not.
fn enact_sampled(
    worker: &Worker,
    switch: &Switch,
    relation: Relation,
    natural: Natural,
    flags: [bool; 2],
) -> Facts {
    let [stored, takes_new] = flags;
    switch.set(stored);
    let stored = match (relation, stored) {
        (Relation::Resumed, true) => store_from_elsewhere(worker, "01"),
        (Relation::Resumed, false) => store_from_elsewhere(worker, "00"),
        (relation, _) => store(worker, relation),
    };
    switch.set(takes_new);
    enact_beside(worker, relation, natural, stored)
}

/// Runs a test with a parent-based sampler whose decision for roots is a switch.
fn for_each_worker_with_a_switch(
    make: impl Fn() -> WorkflowContextStorageBuilder,
    test: impl Fn(&Worker, &Switch),
) {
    for_each_via(|via| {
        let switch = Switch::default();
        let sampler = Sampler::ParentBased(Box::new(switch.clone()));
        let worker =
            Worker::via_with_sampler(via, make().build().expect("valid settings"), sampler);
        worker.run(|| test(&worker, &switch));
    });
}

#[test]
fn an_instance_with_an_unsampled_root_is_never_exported_and_stays_in_one_trace() {
    // A span whose id is recorded late was sampled before.
    let relations = RELATIONS
        .into_iter()
        .filter(|(relation, _)| *relation != Relation::Late);
    for (relation, _) in relations {
        for &natural in naturals(relation) {
            if (relation, natural) == (Relation::SameTrace, Natural::Remote) {
                continue; // A nested span inherits the flag of its natural parent.
            }
            labelled(
                &format!("{relation:?}, natural parent: {natural:?}"),
                || {
                    for_each_worker_with_a_switch(
                        || builder_for(relation),
                        |worker, switch| {
                            let facts =
                                enact_sampled(worker, switch, relation, natural, [false, true]);
                            let unsampled = (facts.stored.trace_id(), false);
                            let subject = (facts.subject.trace_id(), facts.subject.is_sampled());
                            assert_eq!(subject, unsampled, "trace and sampled flag");
                            let stored = worker.stored(ID);
                            assert_eq!((stored.trace_id(), stored.is_sampled()), unsampled);
                            assert!(!worker.names().contains(&"subject".to_owned()));
                        },
                    );
                },
            );
        }
    }
}

#[test]
fn a_resampled_relation_takes_a_new_sampling_decision_for_a_new_trace() {
    for relation in RESAMPLED {
        for flags @ [_, is_taken] in [[false, true], [true, false], [true, true], [false, false]] {
            for natural in [Natural::None, Natural::Local, Natural::Remote] {
                let label =
                    format!("{relation:?}, [stored, new]: {flags:?}, natural parent: {natural:?}");
                let test = |worker: &Worker, switch: &Switch| {
                    let Facts {
                        natural,
                        stored,
                        subject,
                    } = enact_sampled(worker, switch, relation, natural, flags);
                    let known = natural.iter().chain([&stored]).map(SpanContext::trace_id);
                    assert!(
                        known.into_iter().all(|trace| trace != subject.trace_id()),
                        "not a new trace"
                    );
                    assert_eq!(subject.is_sampled(), is_taken);
                    assert_eq!(
                        ids(&worker.stored(ID)),
                        ids(&subject),
                        "the stored context afterwards"
                    );
                    assert_eq!(worker.stored(ID).is_sampled(), is_taken);
                    if is_taken {
                        assert_root(&worker.span("subject"));
                        let to_stored = (relation.as_str().to_owned(), ids(&stored));
                        // A new run or generation keeps the request that it comes from.
                        let is_new = relation != Relation::Resumed;
                        let request = natural.filter(|_| is_new);
                        let request = request.map(|request| ("foreign".to_owned(), ids(&request)));
                        assert_eq!(
                            links(&worker.span("subject")),
                            Vec::from_iter([to_stored].into_iter().chain(request))
                        );
                    }
                };
                labelled(&label, || {
                    for_each_worker_with_a_switch(
                        || builder_for(relation).resample_on(relation),
                        test,
                    );
                });
            }
        }
    }
}

#[test]
fn a_relation_that_starts_no_trace_cannot_be_resampled() {
    for (relation, _) in RELATIONS {
        match WorkflowContextStorage::builder()
            .resample_on(relation)
            .build()
        {
            Ok(_) => assert!(RESAMPLED.contains(&relation), "{relation:?}"),
            Err(refusal) => assert_eq!(
                refusal.to_string(),
                format!(
                    "resample_on: {relation:?} begins no new trace; \
                     a fresh sampling decision can be taken on Resumed, NewRun and Expired"
                )
            ),
        }
    }
}

// Settings.

#[test]
fn the_last_setting_of_a_relation_is_used() {
    let make = || {
        let builder = WorkflowContextStorage::builder();
        let builder = builder.relation(Relation::Late, Continuation::NewRoot);
        let builder = builder.relation(Relation::Late, Continuation::Keep);
        builder
            .build()
            .expect("what was impossible has been taken back")
    };
    for_each_worker(make, |worker| {
        let facts = enact(worker, Relation::Late, Natural::None);
        expect(worker, Relation::Late, Continuation::Keep, &facts);
    });
}

#[test]
fn invalid_settings_are_refused_with_an_explanation() {
    let builder = WorkflowContextStorage::builder;
    let refused = [
        (
            builder().instance_id_fields(Vec::<&str>::new()),
            "instance_id_fields: at least one field name is needed",
        ),
        (
            builder().instance_id_fields(["workflow.instance_id", ""]),
            "instance_id_fields: a name must not be empty",
        ),
        (
            builder().adopt_spans(["engine", ""]),
            "adopt_spans: a name must not be empty",
        ),
        (
            builder().replay_field(""),
            "replay_field: a name must not be empty",
        ),
        (
            builder().run_id_fields(["run", ""]),
            "run_id_fields: a name must not be empty",
        ),
        (
            builder().parent_instance_id_fields([""]),
            "parent_instance_id_fields: a name must not be empty",
        ),
        (
            builder().status_fields([""]),
            "status_fields: a name must not be empty",
        ),
        (
            builder().instance_id_fields(["workflow.run_id"]),
            "instance_id_fields: the field \"workflow.run_id\" belongs to run_id_fields; \
             a field has one meaning, choose another name",
        ),
        (
            builder()
                .run_id_fields(["run"])
                .status_fields(["workflow.run_id"]),
            "status_fields: the field \"workflow.run_id\" belongs to run_id_fields; \
             a field has one meaning, choose another name",
        ),
        (
            builder().replay_field("workflow.instance_id"),
            "replay_field: the field \"workflow.instance_id\" belongs to instance_id_fields; \
             a field has one meaning, choose another name",
        ),
        (
            builder()
                .instance_id_fields(["order.id"])
                .parent_instance_id_fields(["parent", "order.id"]),
            "parent_instance_id_fields: the field \"order.id\" belongs to instance_id_fields; \
             a field has one meaning, choose another name",
        ),
        (
            builder().instance_id_fields(["workflow.resumed"]),
            "instance_id_fields: the field \"workflow.resumed\" belongs to the layer, which writes it; \
             a field has one meaning, choose another name",
        ),
        (
            builder()
                .instance_id_fields(["temporalRunID"])
                .engine(Engine::Temporal),
            "engine: the field \"temporalRunID\" belongs to instance_id_fields; \
             a field has one meaning, choose another name",
        ),
        (
            builder().max_age(Duration::ZERO),
            "max_age: must be more than zero",
        ),
        (builder().max_spans(0), "max_spans: must be more than zero"),
        (
            builder().max_instances(0),
            "max_instances: must be more than zero",
        ),
        (
            builder().idle_ttl(Duration::ZERO),
            "idle_ttl: must be more than zero",
        ),
    ];
    for (builder, sentence) in refused {
        let settings = format!("{builder:?}");
        let refusal = builder.build().expect_err(&settings);
        assert_eq!(refusal.to_string(), sentence);
    }
}

#[test]
fn minimal_valid_settings_are_accepted() {
    let builder = WorkflowContextStorage::builder()
        .instance_id_fields(["i", "i", "temporalWorkflowID"])
        .run_id_fields(["temporalRunID"])
        .parent_instance_id_fields(Vec::<&str>::new())
        .status_fields(["workflow.status"])
        .replay_field("workflow.replaying")
        .engine(Engine::Temporal)
        .adopt_spans(["e"])
        .replay_field("r")
        .max_age(Duration::from_nanos(1))
        .max_spans(1)
        .max_instances(1)
        .idle_ttl(Duration::from_nanos(1))
        .completed_grace(Duration::ZERO)
        .recent_decisions(0);
    builder.build().expect("nothing is missing");
}
