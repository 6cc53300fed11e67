//! What is expected of the traces, for each way.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use opentelemetry::trace::{SpanContext, TraceId};
use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::testing::TraceForest;

use crate::Way;
use crate::order::ORDER;
use crate::pipe::{OF, RUN};

/// The client's span.
const ROOT: &str = "place order";

/// What runs in the order's first run or before, and in its child workflow, each once. `call_bank(1)` died with its worker.
const FIRST_RUN: [&str; 19] = [
    ROOT,
    "order(1)",
    "await reserve",
    "call_warehouse(1)",
    "call_warehouse(2)",
    "await timer",
    "await pack",
    "pack",
    "await wrap",
    "call_packer",
    "check_address",
    "send_to",
    "await look_up_address",
    "call_map",
    "is_approved",
    "approve",
    "await approval",
    "await charge",
    "call_bank(2)",
];

/// The same of its second run.
const SECOND_RUN: [&str; 6] = [
    "order(2)",
    "await truck",
    "await ship",
    "call_carrier",
    "await send_bill",
    "call_mailer",
];

/// The spans of a signal. The core of SDK 1.1.1 takes a workflow task that brought no commands, and is followed by another one at
/// once, for a heartbeat (temporalio-sdk-core 0.10.1, src/worker/workflow/history_update.rs:740): a signal in it is handled again
/// with the next, and told to be new.
const RUN_AGAIN_BY_CORE: [&str; 2] = ["HandleSignal:approve [run 1]", "approve"];

/// Fails on anything but the traces expected of one order, and draws those of the ways that are to be compared. Returns the
/// counts.
pub fn check(way: Way, spans: &[SpanData]) -> Result<String> {
    let spans = with_short_names(spans);
    let forest = TraceForest::from_spans(&spans);
    let found = Found::in_spans(&forest);
    let counts = format!(
        "{}: {} trace{}, {} spans, {} of them repeats",
        way.name(),
        forest.trace_count(),
        if forest.trace_count() == 1 { "" } else { "s" },
        forest.span_count(),
        found.repeats,
    );
    let checked = found.check(way, &forest);
    if way.is_drawn() || checked.is_err() {
        println!("---- {counts}\n\n{forest}\n");
    }
    checked.with_context(|| format!("not as expected: {counts}"))?;
    Ok(counts)
}

struct Found<'a> {
    /// The spans of the user's code, by name.
    by_name: BTreeMap<&'a str, Vec<&'a SpanData>>,
    /// Spans of code that had run before.
    repeats: usize,
    links: Vec<(&'a SpanData, &'a SpanContext)>,
    /// The spans whose parent was not exported, by trace.
    tops: BTreeMap<[u8; 16], Vec<&'a SpanData>>,
}

impl<'a> Found<'a> {
    fn in_spans(forest: &'a TraceForest) -> Self {
        let mut found = Self {
            by_name: BTreeMap::new(),
            repeats: 0,
            links: Vec::new(),
            tops: BTreeMap::new(),
        };
        for span in forest.spans() {
            // The SDK opens its own for each activation of a workflow and attempt at an activity.
            if !span.name.starts_with("Run") {
                let same = found.by_name.entry(&span.name).or_default();
                found.repeats += usize::from(!same.is_empty());
                same.push(span);
            }
            let targets = span.links.iter().map(|link| (span, &link.span_context));
            found.links.extend(targets);
            if forest.parent_of(span).is_none() {
                let trace = trace_of(span).to_bytes();
                found.tops.entry(trace).or_default().push(span);
            }
        }
        found
    }

    fn check(&self, way: Way, forest: &TraceForest) -> Result<()> {
        let names = FIRST_RUN.iter().chain(&SECOND_RUN);
        for name in names {
            ensure!(self.by_name.contains_key(name), "no span {name}");
        }
        let traces = forest.trace_count();
        let expected = match way {
            Way::Plain => return Ok(ensure!(traces > 3, "expected torn traces")),
            // The child workflow does not name its parent.
            Way::IdAlone => 3,
            Way::AllFields | Way::Interceptor => 2,
            Way::OneTrace => 1,
        };
        ensure!(traces == expected, "expected {expected} traces");
        let is_root = |span: &&SpanData| span.parent_span_id == opentelemetry::SpanId::INVALID;
        for tops in self.tops.values() {
            ensure!(tops.len() == 1, "expected one root in each trace");
            ensure!(tops.iter().all(is_root), "a root is missing");
        }

        let first = forest.find(ROOT).context("no span of the client")?;
        ensure!(is_root(&first), "the client's span is not the root");
        if way != Way::IdAlone {
            self.all_in(&FIRST_RUN, trace_of(first))?;
            let second = self.by_name["order(2)"][0];
            self.all_in(&SECOND_RUN, trace_of(second))?;
        }
        if way != Way::OneTrace {
            let [(from, to)] = self.links[..] else {
                anyhow::bail!("expected one link, not {}", self.links.len());
            };
            ensure!(is_root(&from), "expected the link on the new run's root");
            ensure!(to.trace_id() == trace_of(first), "expected a link to run 1");
        }
        if way.has_interceptor() {
            for (name, spans) in &self.by_name {
                let may_be_twice = RUN_AGAIN_BY_CORE.contains(name);
                let is_repeated = spans.len() > 1 + usize::from(may_be_twice);
                ensure!(!is_repeated, "expected {name} once");
            }
        }
        Ok(())
    }

    fn all_in(&self, names: &[&str], trace: TraceId) -> Result<()> {
        for name in names {
            let is_elsewhere = |span: &&SpanData| trace_of(span) != trace;
            let elsewhere = self.by_name[name].iter().copied().any(|s| is_elsewhere(&s));
            ensure!(!elsewhere, "{name} is in another trace than it should be");
        }
        Ok(())
    }
}

fn trace_of(span: &SpanData) -> TraceId {
    span.span_context.trace_id()
}

/// Says `run 1` where the id of a run was.
fn with_short_names(spans: &[SpanData]) -> Vec<SpanData> {
    let mut spans = spans.to_vec();
    spans.sort_by_key(|span| span.start_time);
    let mut runs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for span in &mut spans {
        let name = span.name.to_string();
        let Some((name, (id, run))) = name
            .rsplit_once(OF)
            .and_then(|(name, rest)| Some((name, rest.rsplit_once(RUN)?)))
        else {
            continue;
        };
        let known = runs.entry(id.to_owned()).or_default();
        if !known.iter().any(|it| it == run) {
            known.push(run.to_owned());
        }
        // A user's span is known by its name alone.
        if name.contains(':') {
            let number = known.iter().position(|it| it == run).map_or(0, |at| at + 1);
            let of = id.strip_prefix(ORDER).unwrap_or(id);
            span.name = format!("{name} [run {number}{of}]").into();
        } else {
            span.name = name.to_owned().into();
        }
    }
    spans
}
