//! The end of a root: one process claims it in the backend, sums up the parts of all processes, and exports the span.
//!
//! Everything goes through the writer's [`PutIfAbsent`](Write::PutIfAbsent), which every backend has: it claims the end, and
//! it claims a place for each process that has spans of the instance. To sum up, the process that ends the root tries to
//! take one place after the other: it finds the parts of the others, and with the first free place shuts out all that
//! come later.
//!
//! If the process dies between its claim and the export, the root is exported by nobody.

use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::trace::{
    Event, Link, SpanBuilder, SpanContext, Status, TraceContextExt as _, TraceState,
};
use opentelemetry::{Context, KeyValue};

use super::allocate::identifying_attributes;
use super::ids::{self, Purpose, Request};
use super::state::{Ending, Part, Place, Progress, Roots, Stage};
use crate::backend::keys::{instance_key, root_key, run_key};
use crate::backend::write_queue::{FollowUp, OnWinner};
use crate::backend::{Record, RootSpan, Write};
use crate::caught::caught;
use crate::context::WorkflowContext;
use crate::fields;
use crate::fields::value::EndStatus;
use crate::lock::lock;
use crate::own_spans::End;

/// The most processes of one instance that are told apart, and the most hand-overs that become events.
const MAX_PLACES: u32 = 64;
pub(super) const FIRST_PLACE: u32 = 1;
const MAX_RESUMED_EVENTS: usize = 32;

/// The lifetime of a part, in idle times: nobody refreshes the part of a process that has died.
pub(super) const PART_LIFETIME: u32 = 8;

/// The number of spans in a record that is no part: the first place that was free at the end.
pub(super) const SHUT: u64 = u64::MAX;

/// The part of a key that stands for the end.
const END: &str = "end";

/// The sum over all processes.
struct Total {
    spans: u64,
    last_end: SystemTime,
    processes: u64,
    resumed_at: Vec<SystemTime>,
}

/// Asks for a place in the backend, where the part of this process is kept.
pub(super) fn ask_for_place(part: &Arc<Part>) {
    if let Some(client) = part.roots.client() {
        let (write, on_winner) = ask(part.clone(), FIRST_PLACE);
        client.claim(write, on_winner);
    }
}

fn ask(part: Arc<Part>, place: u32) -> (Write, OnWinner) {
    let write = {
        let now = part.roots.clock.now();
        let record = part.as_part(place, &lock(&part.progress), 0, now);
        Write::PutIfAbsent(part.place_key(place), record)
    };
    let on_winner = move |there: Record| {
        let (is_own, root) = (part.is_own(&there), there.root);
        let root = root.filter(|root| root.spans != SHUT);
        // Read before anything is locked: a clock may be anybody's code.
        let now = part.roots.clock.now();
        let mut progress = lock(&part.progress);
        match root {
            None => {
                progress.stage = Stage::Closed;
                Vec::new()
            }
            // Its own as well if memory had forgotten the instance.
            Some(root) if is_own => {
                progress.place = Place::Taken(place);
                progress.spans += root.spans;
                progress.last_end = progress.last_end.max(root.last_end);
                let record = part.as_part(place, &progress, progress.spans, now);
                drop(progress);
                let write = Write::Put(part.place_key(place), record);
                let on_winner = None;
                vec![FollowUp { write, on_winner }]
            }
            Some(_) if place < MAX_PLACES => {
                drop(progress);
                let (write, on_winner) = ask(part, place + 1);
                let on_winner = Some(on_winner);
                vec![FollowUp { write, on_winner }]
            }
            Some(_) => {
                progress.place = Place::NoneLeft;
                Vec::new()
            }
        }
    };
    (write, Box::new(on_winner))
}

/// Writes what has ended in this process so far.
pub(super) fn write_part(part: &Arc<Part>, place: u32) {
    if let Some(client) = part.roots.client() {
        let now = part.roots.clock.now();
        // Sent under the lock, so that no later state is overwritten by an earlier one. Sending waits for no lock.
        let progress = lock(&part.progress);
        let record = part.as_part(place, &progress, progress.spans, now);
        client.write(Write::Put(part.place_key(place), record));
    }
}

/// Claims the end, and exports the root if no other process has done so.
pub(super) fn close(part: &Arc<Part>) {
    let own = Total::of_own(part);
    let (is_superseded, place) = {
        let progress = lock(&part.progress);
        let status = progress.ending.map(|ending| ending.status);
        (status == Some(EndStatus::Superseded), progress.place)
    };
    match part.roots.client() {
        Some(client) if !is_superseded => {
            let write = Write::PutIfAbsent(part.key(END), part.record_now(SHUT));
            let part = part.clone();
            let on_winner = move |there: Record| {
                if part.is_own(&there) {
                    sum_up(part, own, FIRST_PLACE)
                } else {
                    lock(&part.progress).stage = Stage::Closed;
                    Vec::new()
                }
            };
            client.claim(write, Box::new(on_winner));
        }
        // Nobody else has this root.
        client => {
            if let (Some(client), true) = (client, place != Place::None) {
                // Nor shall anybody find its part, and take it for abandoned.
                let end = part.record_now(SHUT);
                client.write(Write::PutIfAbsent(part.key(END), end));
            }
            export(part, &own);
        }
    }
}

/// Adds the parts of the other processes, from that place on, and exports the root.
fn sum_up(part: Arc<Part>, mut total: Total, place: u32) -> Vec<FollowUp> {
    if place > MAX_PLACES {
        export(&part, &total);
        return Vec::new();
    }
    let key = part.place_key(place);
    let write = Write::PutIfAbsent(key.clone(), part.record_now(SHUT));
    let on_winner = move |there: Record| {
        let is_own = part.is_own(&there);
        let root = there.root.filter(|root| root.spans != SHUT);
        let Some(root) = root else {
            export(&part, &total);
            return Vec::new();
        };
        if !is_own {
            total.add(&root);
        }
        if place > FIRST_PLACE {
            total.resumed_at.push(root.started_at);
        }
        let mut next = sum_up(part.clone(), total, place + 1);
        let write = Write::Expire(key, part.roots.completed_from_now());
        next.push(FollowUp {
            write,
            on_winner: None,
        });
        next
    };
    vec![FollowUp {
        write,
        on_winner: Some(Box::new(on_winner)),
    }]
}

impl Total {
    fn of_own(part: &Part) -> Self {
        let progress = lock(&part.progress);
        Self {
            spans: progress.spans,
            last_end: progress.last_end,
            processes: u64::from(progress.place != Place::None || progress.spans > 0),
            resumed_at: Vec::new(),
        }
    }

    fn add(&mut self, other: &RootSpan) {
        self.spans = self.spans.saturating_add(other.spans);
        self.last_end = self.last_end.max(other.last_end);
        self.processes += 1;
    }
}

/// Exports the root. No lock is held meanwhile.
fn export(part: &Part, total: &Total) {
    let (ending, links) = {
        let mut progress = lock(&part.progress);
        progress.stage = Stage::Closed;
        (progress.ending, std::mem::take(&mut progress.links))
    };
    let (Some(ending), true) = (ending, part.context.is_sampled()) else {
        return;
    };
    let roots = &part.roots;
    let Ending { status, at } = ending;
    if status == EndStatus::Abandoned {
        roots.warn_without_end(1);
    }
    let own = part.context.to_span_context();
    let span = &part.span;
    let parent = match span.parent_span_id {
        None => Context::new(),
        Some(parent) => Context::new().with_remote_span_context(SpanContext::new(
            own.trace_id(),
            parent,
            own.trace_flags(),
            true,
            own.trace_state().clone(),
        )),
    };
    let mut attributes = identifying_attributes(&part.id, part.run_id.as_deref());
    let number = |name, count: u64| KeyValue::new(name, i64::try_from(count).unwrap_or(i64::MAX));
    attributes.extend([
        KeyValue::new(fields::STATUS, status.as_str()),
        number(fields::SPANS, total.spans),
        number(fields::PROCESSES, total.processes.max(1)),
        number(fields::RESUMES, total.resumed_at.len() as u64),
        number(fields::GENERATION, part.generation.into()),
    ]);
    let resumed = total.resumed_at.iter().take(MAX_RESUMED_EVENTS);
    let resumed = resumed.map(|at| Event::new("resumed", *at, Vec::new(), 0));
    let link = |(to, relation): (SpanContext, String)| {
        Link::new(to, vec![KeyValue::new(fields::RELATION, relation)], 0)
    };
    let links = span.links.iter().cloned().chain(links);
    let builder = SpanBuilder::from_name(span.name.clone())
        .with_start_time(span.started_at)
        .with_attributes(attributes)
        .with_events(resumed.collect())
        .with_links(links.map(link).collect());
    let end = span.started_at.max(total.last_end);
    let end = match status {
        // Told long after the last thing that happened.
        EndStatus::Abandoned => end,
        _ => end.max(at),
    };
    let end = End {
        status: match status.is_error() {
            true => Status::error(status.as_str()),
            false => Status::Unset,
        },
        at: Some(end),
        span_id: Some(span.span_id),
    };
    let request = Request {
        purpose: Purpose::Export(own.trace_state().clone()),
        trace_id: Some(own.trace_id()),
        span_id: Some(span.span_id),
    };
    let export = || roots.tracers.export(builder, &parent, end);
    match ids::asking(request, || caught(export)).0 {
        Some(Some(_)) => roots.counters.exported_roots.add(),
        Some(None) => roots.counters.lost_roots.add(),
        None => {
            roots.counters.lost_roots.add();
            roots.count_panic("the span of a workflow was exported");
        }
    }
}

impl Part {
    fn key(&self, part: &str) -> String {
        root_key(&self.id, self.span.span_id, part)
    }

    fn place_key(&self, place: u32) -> String {
        root_key(&self.id, self.span.span_id, place)
    }

    /// Returns `true` if this process has written the record.
    fn is_own(&self, record: &Record) -> bool {
        record.context.span_id() == self.roots.token
    }

    /// Returns a record that claims a key of the root.
    fn record_now(&self, spans: u64) -> Record {
        let now = self.roots.clock.now();
        self.as_record(&lock(&self.progress), spans, now)
    }

    /// Returns the record of this process's part. The one in the first place has the whole root: it is still found when
    /// the record of the instance has expired.
    fn as_part(&self, place: u32, progress: &Progress, spans: u64, now: SystemTime) -> Record {
        let mut record = self.as_record(progress, spans, now);
        if place == FIRST_PLACE {
            record.context = self.token(self.context.to_span_context().trace_state().clone(), now);
            record.run_id = self.run_id.as_deref().map(str::to_owned);
            if let Some(root) = &mut record.root {
                root.started_at = self.span.started_at;
                root.parent_span_id = self.span.parent_span_id;
                root.links.clone_from(&self.span.links);
            }
        }
        record
    }

    fn as_record(&self, progress: &Progress, spans: u64, now: SystemTime) -> Record {
        let root = RootSpan {
            last_end: progress.last_end,
            spans,
            ..RootSpan::new(
                self.span.span_id,
                self.span.name.clone(),
                progress.first_seen,
            )
        };
        Record {
            context: self.token(TraceState::NONE, now),
            run_id: None,
            generation: self.generation,
            expires_at: self.roots.part_expiry(now),
            root: Some(Box::new(root)),
        }
    }

    /// Returns the root's context with the token of this process as its span id.
    fn token(&self, state: TraceState, now: SystemTime) -> WorkflowContext {
        let own = self.context.to_span_context();
        let flags = own.trace_flags();
        let token = SpanContext::new(own.trace_id(), self.roots.token, flags, false, state);
        // Neither id is zero.
        WorkflowContext::from_span(&token, now).unwrap_or_else(|| self.context.clone())
    }

    /// The key under which the instance's record is found.
    pub(super) fn record_key(&self) -> String {
        match &self.run_id {
            Some(run_id) => run_key(&self.id, run_id),
            None => instance_key(&self.id),
        }
    }
}

impl Roots {
    fn completed_from_now(&self) -> SystemTime {
        let grace = self.backing.get().map(|backing| backing.completed);
        let now = self.clock.now();
        crate::clock::after(now, grace.unwrap_or_default())
    }

    fn part_expiry(&self, now: SystemTime) -> SystemTime {
        let idle = self.backing.get().map(|backing| backing.idle);
        let lifetime = idle.unwrap_or_default().saturating_mul(PART_LIFETIME);
        crate::clock::after(now, lifetime)
    }
}
