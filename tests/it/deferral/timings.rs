//! Busy and idle time of held spans.

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
