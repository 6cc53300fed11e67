//! Busy and idle time of held spans.

use tracing_subscriber::prelude::*;

use super::*;

/// Keeps a core busy, and returns for how long.
fn spin() -> Duration {
    let start = Instant::now();
    while start.elapsed() < BUSY {
        std::hint::spin_loop();
    }
    start.elapsed()
}

/// Checks the timings of a span against the wall clock. `live` uses the span, and returns for how long it was busy
/// at least.
#[track_caller]
fn assert_timings(worker: &Worker, open: fn(&str) -> Span, live: impl FnOnce(&Span) -> Duration) {
    let start = Instant::now();
    let span = open("timed");
    let at_least = live(&span);
    drop(span);
    let elapsed = start.elapsed();

    let span = worker.span("timed");
    let nanos = |key| match attribute(&span, key) {
        Some(Value::I64(nanos)) => {
            Duration::from_nanos(nanos.try_into().expect("no negative time"))
        }
        other => panic!("{key} is {other:?}"),
    };
    let (busy, idle) = (nanos("busy_ns"), nanos("idle_ns"));
    assert!(busy >= at_least, "{busy:?} busy, of {at_least:?} at least");
    assert!(
        busy + idle <= elapsed,
        "{busy:?} busy and {idle:?} idle within {elapsed:?}"
    );
    let internal = |kv: &&KeyValue| kv.key.as_str().contains("held");
    assert_eq!(span.attributes.iter().find(internal), None);
}

#[test]
fn the_time_before_the_id_is_recorded_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, awaiting, |span| {
            span.in_scope(|| {
                let before = spin();
                span.record(ID, "order");
                before + spin()
            })
        });
    });
}

#[test]
fn the_time_before_the_first_child_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, engine, |span| {
            let first_poll = span.in_scope(spin);
            let second_poll = span.in_scope(|| {
                let before = spin();
                step("child");
                before + spin()
            });
            first_poll + second_poll
        });
    });
}

#[test]
fn the_time_in_a_span_that_never_learns_its_id_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, awaiting, |span| {
            span.in_scope(spin) + span.in_scope(spin)
        });
    });
}

#[test]
fn the_time_in_an_engine_span_without_children_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, engine, |span| {
            span.in_scope(spin) + span.in_scope(spin)
        });
    });
}

#[test]
fn time_between_polls_stays_idle_time() {
    in_both_modes(|worker| {
        let span = engine("timed");
        span.in_scope(|| ());
        let between = i64::try_from(spin().as_nanos()).expect("a short time");
        span.in_scope(|| tagged_step("child", "order"));
        drop(span);

        let idle = attribute(&worker.span("timed"), "idle_ns");
        assert!(
            matches!(idle, Some(Value::I64(idle)) if idle >= between),
            "{idle:?} idle, with {between} between"
        );
    });
}

#[test]
fn time_in_a_held_span_that_is_entered_twice_counts_once() {
    for open in [awaiting, engine] {
        in_both_modes(|worker| {
            assert_timings(worker, open, |span| {
                span.in_scope(|| span.in_scope(spin) + spin())
            });
        });
    }
}

#[test]
fn time_in_a_held_span_that_is_entered_on_two_threads_counts_once() {
    for open in [awaiting, engine] {
        in_both_modes(|worker| {
            assert_timings(worker, open, |span| {
                span.in_scope(|| elsewhere(worker, || span.in_scope(spin)) + spin())
            });
        });
    }
}

#[test]
fn time_in_a_span_that_another_thread_releases_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, awaiting, |span| {
            span.in_scope(|| {
                let before = spin();
                elsewhere(worker, || {
                    span.in_scope(|| {
                        span.record(ID, "order");
                    });
                });
                before + spin()
            })
        });
    });
}

/// How long the spans that are compared with the plain layer's are busy, or idle.
const LONG: Duration = Duration::from_millis(30);

/// A span of this crate's layer, and one of the plain layer that is entered and exited together with it.
struct Twins<'a> {
    worker: &'a Worker,
    ours: Span,
    plain: Span,
    /// By how much their times may differ: what passed from an action on one of them to the same on the other.
    tolerance: Mutex<Duration>,
}

impl Twins<'_> {
    fn in_scope(&self, run: impl FnOnce()) {
        let since = Instant::now();
        let mut within = Duration::ZERO;
        self.plain.in_scope(|| {
            self.ours.in_scope(|| {
                let since = Instant::now();
                run();
                within = since.elapsed();
            });
        });
        *self.tolerance.lock().unwrap() += since.elapsed() - within;
    }

    fn busy(&self) {
        self.in_scope(|| std::thread::sleep(LONG));
    }

    fn idle(&self) {
        std::thread::sleep(LONG);
    }
}

/// Returns a worker with the plain OpenTelemetry layer.
pub(super) fn plain_worker(activation: bool) -> Worker {
    let mut worker = Worker::new();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(worker.tracer())
        .with_context_activation(activation);
    worker.dispatch = tracing_subscriber::registry().with(layer).into();
    worker
}

/// Asserts that start, end, `busy_ns` and `idle_ns` are those of the plain layer.
#[track_caller]
fn assert_as_plain(label: &str, scenario: fn(&Twins<'_>)) {
    for open in [awaiting, engine] {
        for activation in [true, false] {
            let worker = Worker::with_sampler(adopting(), activation, Sampler::AlwaysOn);
            let plain = plain_worker(activation);
            let opened = Instant::now();
            let plain_span = plain.run(|| open("twin"));
            let tolerance = worker.run(|| {
                let twins = Twins {
                    worker: &worker,
                    ours: open("twin"),
                    plain: plain_span,
                    tolerance: Mutex::new(opened.elapsed() + Duration::from_millis(1)),
                };
                scenario(&twins);
                twins.tolerance.into_inner().unwrap()
            });

            let [ours, plain] = [&worker, &plain].map(|worker| worker.span("twin"));
            let time = |span: &SpanData, key| match attribute(span, key) {
                Some(Value::I64(nanos)) => {
                    Duration::from_nanos(nanos.try_into().expect("no negative time"))
                }
                other => panic!("{key} is {other:?}"),
            };
            let since_epoch =
                |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).unwrap();
            for (what, ours, plain) in [
                ("busy", time(&ours, "busy_ns"), time(&plain, "busy_ns")),
                ("idle", time(&ours, "idle_ns"), time(&plain, "idle_ns")),
                (
                    "start",
                    since_epoch(ours.start_time),
                    since_epoch(plain.start_time),
                ),
                (
                    "end",
                    since_epoch(ours.end_time),
                    since_epoch(plain.end_time),
                ),
            ] {
                assert!(
                    ours.abs_diff(plain) < tolerance,
                    "{label}, activation {activation}, {what}: {ours:?} is not {plain:?}"
                );
            }
            let internal = |kv: &&KeyValue| kv.key.as_str().contains("held");
            assert_eq!(ours.attributes.iter().find(internal), None);
        }
    }
}

#[test]
fn a_held_span_has_the_times_of_the_plain_layer_however_it_is_released() {
    assert_as_plain("closed long after its last exit", |twins| {
        twins.busy();
        twins.idle();
        twins.busy();
        twins.idle();
    });
    assert_as_plain("released by an explicit child between two polls", |twins| {
        twins.busy();
        twins.idle();
        drop(info_span!(parent: &twins.ours, "child", workflow.instance_id = "order"));
        twins.idle();
    });
    assert_as_plain("released by another thread's child", |twins| {
        twins.in_scope(|| {
            std::thread::sleep(LONG);
            elsewhere(twins.worker, || {
                drop(info_span!(parent: &twins.ours, "child", workflow.instance_id = "order"));
            });
            std::thread::sleep(LONG);
        });
        twins.idle();
    });
    assert_as_plain("entered again after it was released elsewhere", |twins| {
        twins.busy();
        elsewhere(twins.worker, || {
            drop(info_span!(parent: &twins.ours, "child"));
            twins.busy();
        });
        twins.idle();
        twins.busy();
        twins.idle();
    });
    assert_as_plain("released by its id", |twins| {
        twins.busy();
        twins.idle();
        twins.in_scope(|| {
            std::thread::sleep(LONG);
            twins.ours.record(ID, "order");
            std::thread::sleep(LONG);
        });
        twins.idle();
    });
    assert_as_plain("named between two polls, and closed", |twins| {
        twins.busy();
        twins.ours.record(ID, "order");
        twins.idle();
    });
}
