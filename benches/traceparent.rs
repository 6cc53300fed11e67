//! The W3C codec beside the OpenTelemetry SDK's propagator, in one run.
//!
//! `cargo bench --bench traceparent` prints nanoseconds per call, and ours as a part of theirs. Without `--bench`, as
//! `cargo test --benches` starts it, every case runs [`SMOKE_CALLS`] times and nothing is measured.
//!
//! Each side of a case is a function of its own, so that its instructions can be counted as well:
//! `valgrind --tool=callgrind --toggle-collect=traceparent::parse <binary>` prints those of all its calls.

#![allow(clippy::print_stdout, reason = "a bench reports to whoever runs it")]

use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_workflow_context::WorkflowContext;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACESTATE: &str = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE";

/// Calls of each case when nothing is measured.
const SMOKE_CALLS: u32 = 1_000;

/// Calls between two looks at the clock.
const BATCH: u32 = 20_000;

/// Batches of each case; the fastest one counts, since whatever disturbs a batch can only slow it down.
const BATCHES: u32 = 50;

type Carrier = HashMap<String, String>;

/// One case: ours and theirs, doing the same work.
struct Case {
    name: &'static str,
    ours: fn(&Fixture),
    theirs: fn(&Fixture),
}

const CASES: [Case; 4] = [
    Case {
        name: "parse / SDK extract",
        ours: parse,
        theirs: sdk_extract,
    },
    Case {
        name: "traceparent / SDK inject",
        ours: traceparent,
        theirs: sdk_inject,
    },
    Case {
        name: "extract / SDK extract, with tracestate",
        ours: extract_with_state,
        theirs: sdk_extract_with_state,
    },
    Case {
        name: "inject / SDK inject, with tracestate",
        ours: inject_with_state,
        theirs: sdk_inject_with_state,
    },
];

fn main() {
    let fixture = Fixture::new();
    if !std::env::args().any(|arg| arg == "--bench") {
        for case in &CASES {
            run(case.ours, &fixture, SMOKE_CALLS);
            run(case.theirs, &fixture, SMOKE_CALLS);
        }
        return;
    }
    println!("{:<40}{:>9}{:>9}{:>8}", "", "ours", "SDK", "ratio");
    for case in &CASES {
        // By turns, so that a change of clock speed meets both.
        let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
        for _ in 0..BATCHES {
            ours = ours.min(run(case.ours, &fixture, BATCH));
            theirs = theirs.min(run(case.theirs, &fixture, BATCH));
        }
        let [ours, theirs] = [ours, theirs].map(|time| time.as_secs_f64() * 1e9 / f64::from(BATCH));
        let ratio = ours / theirs;
        println!(
            "{:<40}{ours:>6.1} ns{theirs:>6.1} ns{ratio:>8.3}",
            case.name
        );
    }
}

fn run(case: fn(&Fixture), fixture: &Fixture, calls: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..calls {
        case(black_box(fixture));
    }
    start.elapsed()
}

/// What the cases read and write: the same trace in every shape, without a tracestate and with one.
struct Fixture {
    carrier: Carrier,
    carrier_with_state: Carrier,
    context: WorkflowContext,
    context_with_state: WorkflowContext,
    otel: Context,
    otel_with_state: Context,
    sdk: TraceContextPropagator,
}

impl Fixture {
    fn new() -> Self {
        let [context, context_with_state] = ["", TRACESTATE]
            .map(|state| WorkflowContext::parse(TRACEPARENT, state).expect("a valid traceparent"));
        let [carrier, carrier_with_state] = [&context, &context_with_state].map(|context| {
            let mut carrier = Carrier::new();
            context.inject(&mut carrier);
            carrier
        });
        Self {
            carrier,
            carrier_with_state,
            otel: context.to_otel(),
            otel_with_state: context_with_state.to_otel(),
            context,
            context_with_state,
            sdk: TraceContextPropagator::new(),
        }
    }
}

#[inline(never)]
fn parse(_: &Fixture) {
    let _ = black_box(WorkflowContext::parse(
        black_box(TRACEPARENT),
        black_box(""),
    ));
}

#[inline(never)]
fn extract_with_state(fixture: &Fixture) {
    let _ = black_box(WorkflowContext::extract(&fixture.carrier_with_state));
}

#[inline(never)]
fn sdk_extract(fixture: &Fixture) {
    let cx = fixture
        .sdk
        .extract_with_context(&Context::new(), &fixture.carrier);
    assert!(black_box(cx).span().span_context().is_valid());
}

#[inline(never)]
fn sdk_extract_with_state(fixture: &Fixture) {
    let cx = fixture
        .sdk
        .extract_with_context(&Context::new(), &fixture.carrier_with_state);
    assert!(black_box(cx).span().span_context().is_valid());
}

#[inline(never)]
fn traceparent(fixture: &Fixture) {
    black_box(fixture.context.traceparent());
}

#[inline(never)]
fn inject_with_state(fixture: &Fixture) {
    let mut carrier = Carrier::new();
    fixture.context_with_state.inject(&mut carrier);
    black_box(carrier);
}

#[inline(never)]
fn sdk_inject(fixture: &Fixture) {
    let mut carrier = Carrier::new();
    fixture.sdk.inject_context(&fixture.otel, &mut carrier);
    black_box(carrier);
}

#[inline(never)]
fn sdk_inject_with_state(fixture: &Fixture) {
    let mut carrier = Carrier::new();
    fixture
        .sdk
        .inject_context(&fixture.otel_with_state, &mut carrier);
    black_box(carrier);
}
