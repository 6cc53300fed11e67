//! Held spans beside the same spans under the plain OpenTelemetry layer: all but the parent is equal.

use super::timings::plain_worker;
use super::*;

/// The parts of a span that do not depend on where it is placed.
#[derive(Debug, PartialEq)]
struct Rest {
    name: String,
    attributes: Vec<(String, String)>,
    events: Vec<(String, Vec<(String, String)>)>,
    linked: Vec<String>,
    status: String,
    seen: Vec<String>,
}

/// What code inside the spans has seen of the context that was attached there.
type Seen = Mutex<Vec<String>>;

fn see(seen: &Seen) {
    let baggage = Context::map_current(|cx| cx.baggage().get("tenant").map(ToString::to_string));
    seen.lock().unwrap().push(format!("{baggage:?}"));
}

/// Runs the scenario with a worker, and returns the spans without their places, sorted by name.
fn rest_of(worker: &Worker, scenario: fn(&Seen)) -> Vec<Rest> {
    let seen = Seen::default();
    worker.run(|| scenario(&seen));
    let seen = seen.into_inner().unwrap();
    let spans = worker.spans();
    let name_of = |id| {
        let mut found = spans
            .iter()
            .filter(|span| span.span_context.span_id() == id);
        found
            .next()
            .map_or("another", |span| &*span.name)
            .to_owned()
    };
    let plain = |attributes: &[KeyValue]| {
        let attributes = attributes
            .iter()
            .map(|kv| (kv.key.to_string(), kv.value.to_string()));
        // Times are compared elsewhere, and an adopted span is given an id.
        let is_compared = |(key, _): &(String, String)| {
            !["busy_ns", "idle_ns", "thread.id", ID].contains(&&**key)
        };
        let mut attributes: Vec<_> = attributes.filter(is_compared).collect();
        attributes.sort();
        attributes
    };
    let is_foreign = |link: &&opentelemetry::trace::Link| link.attributes.is_empty();
    let mut rest: Vec<_> = spans
        .iter()
        .map(|span| Rest {
            name: span.name.to_string(),
            attributes: plain(&span.attributes),
            events: (span.events.iter())
                .map(|event| (event.name.to_string(), plain(&event.attributes)))
                .collect(),
            linked: (span.links.iter().filter(is_foreign))
                .map(|link| name_of(link.span_context.span_id()))
                .collect(),
            status: format!("{:?}", span.status),
            seen: seen.clone(),
        })
        .collect();
    rest.sort_by(|one, other| one.name.cmp(&other.name));
    rest
}

#[track_caller]
fn assert_equal(scenario: fn(&Seen)) {
    for activation in [true, false] {
        let ours = Worker::with_sampler(adopting(), activation, Sampler::AlwaysOn);
        let ours = rest_of(&ours, scenario);
        let plain = rest_of(&plain_worker(activation), scenario);
        assert_eq!(ours, plain, "activation {activation}");
    }
}

#[test]
fn events_status_attributes_and_links_of_held_spans_are_those_of_the_plain_layer() {
    // Released by its close.
    assert_equal(|_| {
        for open in [engine, awaiting] {
            let span = open("held");
            span.in_scope(|| {
                info!(number = 1, "first");
                tracing::error!("second");
            });
            span.record("workflow.instance_id", Empty);
            span.in_scope(|| info!("in the second poll"));
        }
    });
    // By a child, with events before and after, and by a child beneath another held span.
    assert_equal(|_| {
        engine("outer").in_scope(|| {
            info!("before");
            awaiting("inner").in_scope(|| {
                info!("inside");
                step("child");
                info!("after the child");
            });
            info!("after");
        });
    });
    // By its id, and linked to others.
    assert_equal(|_| {
        let other = ordinary("other");
        other.in_scope(|| ());
        let span = awaiting("held");
        span.follows_from(other.id());
        span.in_scope(|| {
            info!("before");
            record_id("order");
            info!("after");
            span.follows_from(engine("followed").id());
        });
    });
    // By more events than it may have.
    assert_equal(|_| {
        engine("busy").in_scope(|| (0..200).for_each(|n| info!(n, "event")));
    });
    // On another thread, and entered there.
    assert_equal(|_| {
        let span = engine("held");
        span.in_scope(|| info!("here"));
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                tracing::dispatcher::with_default(&dispatch, || {
                    span.in_scope(|| {
                        info!("there");
                        step("child");
                    });
                });
            });
        });
        span.in_scope(|| info!("here again"));
    });
}

#[test]
fn baggage_attached_around_and_inside_held_spans_is_seen_as_under_the_plain_layer() {
    assert_equal(|seen| {
        for open in [engine, awaiting] {
            let tenant =
                |tenant| Context::current().with_baggage([KeyValue::new("tenant", tenant)]);
            let around = tenant("around").attach();
            open("held").in_scope(|| {
                step("child");
                ordinary("child").in_scope(|| see(seen));
            });
            open("held").in_scope(|| {
                see(seen);
                let _inside = tenant("inside").attach();
                see(seen);
                ordinary("child").in_scope(|| see(seen));
            });
            drop(around);
            open("held").in_scope(|| tagged("child", "order").in_scope(|| see(seen)));
        }
    });
}
