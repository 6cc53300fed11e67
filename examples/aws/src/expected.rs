//! What is expected of the traces, for each way.

use std::collections::{BTreeMap, BTreeSet};

use opentelemetry::SpanId;
use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::testing::TraceForest;

use crate::functions::{OF_ORDER, OF_RECEIPT, ORDER, RECEIPT};
use crate::pipe::OF;
use crate::{ORDERS, Result, Way};

pub const HEADER: &str = "\
| | executions | invocations | spans | traces | spans of the user's code | of them repeats |
|---|---|---|---|---|---|---|";

/// The first thing that is done in a child context, whose span the SDK opens without a parent.
const IN_CHILD: &str = "pick a box";

/// The order whose traces are drawn, with those of its receipt.
const DRAWN: usize = 0;

/// Fails on anything but the traces expected, and draws those of one order. Returns a line of counts.
pub fn check(way: Way, invocations: usize, spans: &[SpanData]) -> Result<String> {
    let found = Found::in_spans(spans);
    let traces: BTreeSet<_> = spans.iter().map(trace_of).collect();
    let all: usize = found.user_spans.values().sum();
    let counts = format!(
        "| {} | {} | {invocations} | {} | {} | {all} | {} |",
        way.name(),
        found.traces_of.len(),
        spans.len(),
        traces.len(),
        all - found.user_spans.len(),
    );
    let checked = found.check(way, spans, traces.len());
    let drawn = match &checked {
        Ok(()) => drawn(spans, &found),
        Err(_) => spans.to_vec(),
    };
    println!(
        "---- {}\n\n{}\n",
        way.name(),
        TraceForest::from_spans(&shortened(&drawn))
    );
    checked.map_err(|error| format!("not as expected: {error}\n{HEADER}\n{counts}"))?;
    Ok(counts)
}

struct Found {
    /// The traces of each execution, by its ARN.
    traces_of: BTreeMap<String, BTreeSet<Trace>>,
    /// The traces of each order's and receipt's own spans.
    traces_of_work: BTreeMap<String, BTreeSet<Trace>>,
    /// The spans of the user's code, and how often each was exported.
    user_spans: BTreeMap<String, usize>,
}

impl Found {
    fn in_spans(spans: &[SpanData]) -> Self {
        let mut found = Self {
            traces_of: BTreeMap::new(),
            traces_of_work: BTreeMap::new(),
            user_spans: BTreeMap::new(),
        };
        for span in spans {
            let trace = trace_of(span);
            if let Some((_, arn)) = span.name.split_once(OF) {
                let traces = found.traces_of.entry(arn.to_owned()).or_default();
                traces.insert(trace);
            } else if let Some(work) = work_of(&span.name) {
                let traces = found.traces_of_work.entry(work).or_default();
                traces.insert(trace);
                *found.user_spans.entry(span.name.to_string()).or_default() += 1;
            }
        }
        found
    }

    fn check(&self, way: Way, spans: &[SpanData], traces: usize) -> Result<()> {
        let executions = 2 * ORDERS.len();
        ensure(
            self.traces_of.len() == executions,
            format!("expected {executions} executions"),
        )?;
        let expected = all_work();
        let is_there = |name: &String| self.user_spans.contains_key(name);
        let missing: Vec<_> = expected.iter().filter(|name| !is_there(name)).collect();
        ensure(missing.is_empty(), format!("missing: {missing:?}"))?;
        let names = self.user_spans.keys();
        let others: Vec<_> = names.filter(|name| !expected.contains(*name)).collect();
        ensure(others.is_empty(), format!("unknown: {others:?}"))?;
        if way == Way::Plain {
            return ensure(traces > executions, "expected torn traces".into());
        }

        let repeated = self.user_spans.iter().filter(|(_, times)| **times > 1);
        let repeated: Vec<_> = repeated.collect();
        ensure(repeated.is_empty(), format!("exported again: {repeated:?}"))?;
        ensure(
            traces == executions,
            "expected one trace for each execution".into(),
        )?;
        for traces_of in [&self.traces_of, &self.traces_of_work] {
            let is_whole = traces_of.values().all(|traces| traces.len() == 1);
            let distinct: BTreeSet<_> = traces_of.values().flatten().collect();
            ensure(
                is_whole && distinct.len() == executions,
                "expected one trace for each execution, and none with two".into(),
            )?;
        }
        let mut roots: BTreeMap<Trace, usize> = BTreeMap::new();
        let is_root = |span: &&SpanData| span.parent_span_id == SpanId::INVALID;
        for root in spans.iter().filter(is_root) {
            *roots.entry(trace_of(root)).or_default() += 1;
        }
        ensure(
            roots.len() == executions && roots.values().all(|number| *number == 1),
            "expected one root in each trace".into(),
        )?;
        let ids: BTreeSet<_> = spans.iter().map(span_id).collect();
        let is_orphan =
            |span: &&SpanData| !is_root(span) && !ids.contains(&span.parent_span_id.to_bytes());
        let orphans = spans.iter().filter(is_orphan).count();
        ensure(orphans == 0, format!("{orphans} spans lack their parent"))?;
        ensure(ids.len() == spans.len(), "expected no span id twice".into())?;
        let forest = TraceForest::from_spans(spans);
        ORDERS.iter().try_for_each(|order| {
            let first = forest.find(&format!("{IN_CHILD} {order}"));
            let child = first.and_then(|span| forest.parent_of(span));
            let outer = child.and_then(|span| forest.parent_of(span));
            ensure(
                outer.is_some_and(|outer| outer.name.starts_with("durable_execution")),
                "expected the child context in the handler that runs it".into(),
            )
        })
    }
}

/// Returns the names of all spans of the user's code.
fn all_work() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for order in ORDERS {
        let receipt = order.replace(ORDER, RECEIPT);
        let of_order = OF_ORDER.iter().map(|what| (what, order));
        let of_receipt = OF_RECEIPT.iter().map(|what| (what, &*receipt));
        for (what, whose) in of_order.chain(of_receipt) {
            all.insert(match what.split_once(" (") {
                Some((what, attempt)) => format!("{what} {whose} ({attempt}"),
                None => format!("{what} {whose}"),
            });
        }
    }
    all
}

/// Returns the order or receipt that a span of the user's code names.
fn work_of(name: &str) -> Option<String> {
    let is_work = |word: &&str| {
        [ORDER, RECEIPT].iter().any(|kind| {
            word.strip_prefix(kind)
                .is_some_and(|it| it.starts_with('-'))
        })
    };
    name.split(' ').find(is_work).map(str::to_owned)
}

/// Returns the spans of all traces in which one order or its receipt is.
fn drawn(spans: &[SpanData], found: &Found) -> Vec<SpanData> {
    let order = ORDERS[DRAWN].to_owned();
    let receipt = order.replace(ORDER, RECEIPT);
    let shown: BTreeSet<_> = [order, receipt]
        .iter()
        .filter_map(|work| found.traces_of_work.get(work))
        .flatten()
        .collect();
    let is_shown = |span: &&SpanData| shown.contains(&trace_of(span));
    spans.iter().filter(is_shown).cloned().collect()
}

/// Leaves the executions out of the names of engine spans.
fn shortened(spans: &[SpanData]) -> Vec<SpanData> {
    let mut spans = spans.to_vec();
    for span in &mut spans {
        if let Some((name, _)) = span.name.split_once(OF) {
            span.name = name.to_owned().into();
        }
    }
    spans
}

/// The bytes of a trace id, which has no order.
type Trace = [u8; 16];

fn trace_of(span: &SpanData) -> Trace {
    span.span_context.trace_id().to_bytes()
}

fn span_id(span: &SpanData) -> [u8; 8] {
    span.span_context.span_id().to_bytes()
}

fn ensure(holds: bool, otherwise: String) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
