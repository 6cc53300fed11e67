//! The W3C codec beside the OpenTelemetry SDK's propagator, in one run.
//!
//! `cargo bench --bench traceparent [-- [--csv <file>] [<case>...]]`. Each side of a case is a function of its own, so
//! that its instructions can be counted as well: `valgrind --tool=callgrind --toggle-collect=traceparent::parse
//! <binary>` prints those of all its calls.

#![allow(clippy::print_stdout, reason = "a bench reports to whoever runs it")]

#[path = "support/report.rs"]
mod report;

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Instant;

use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use report::{Bench, Case, by_turns};
use tracing_workflow_context::WorkflowContext;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACESTATE: &str = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE";

/// Calls between two looks at the clock.
const BATCH: u32 = 20_000;

const ROUNDS: usize = 51;

type Carrier = HashMap<String, String>;

type Side = (&'static str, fn(&Fixture));

/// Ours and theirs, doing the same work.
const CASES: [(&str, [Side; 2]); 4] = [
    ("parse", [("ours", parse), ("SDK", sdk_extract)]),
    ("format", [("ours", traceparent), ("SDK", sdk_inject)]),
    (
        "extract with tracestate",
        [
            ("ours", extract_with_state),
            ("SDK", sdk_extract_with_state),
        ],
    ),
    (
        "inject with tracestate",
        [("ours", inject_with_state), ("SDK", sdk_inject_with_state)],
    ),
];

fn main() {
    let mut bench = Bench::from_arguments("traceparent");
    let fixture = Fixture::new();
    let (rounds, calls) = bench.unless_test((ROUNDS, BATCH), (1, 1_000));
    for (what, mut sides) in CASES {
        if !bench.wants(what) {
            continue;
        }
        let run = |(_, run): &mut Side| {
            let start = Instant::now();
            (0..calls).for_each(|_| run(black_box(&fixture)));
            start.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
        };
        let results = by_turns(rounds, &mut sides, |(name, _)| (*name).into(), run);
        let case = Case {
            what,
            size: 0,
            threads: 1,
        };
        bench.tell(case, "ns", "SDK", &results);
    }
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
