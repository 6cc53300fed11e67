//! Abandoned workflows: their roots are exported with what is known, so that no trace stays headless.
//!
//! A process looks at the roots that its memory has forgotten once their records have expired in the backend. Those of
//! processes that have died are found by a sweep: now and then one process, which claims it, scans the backend for parts of
//! roots that nothing has been added to for an idle time.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, SystemTime};

use opentelemetry::TraceId;
use opentelemetry::trace::{SpanContext, TraceFlags, TraceState};

use super::close::{self, FIRST_PLACE, PART_LIFETIME, SHUT};
use super::state::{Due, Ending, MAX_DUE, Part, Roots, Stage};
use crate::backend::client::Client;
use crate::backend::keys::{SWEEP_KEY, root_part};
use crate::backend::reader::OnLate;
use crate::backend::{Record, Write};
use crate::caught::caught;
use crate::clock::{OnTick, after, ticks};
use crate::context::WorkflowContext;
use crate::fields::value::EndStatus;
use crate::lock::lock;

/// The time after which a forgotten root is looked at again while the backend does not answer.
const RETRY: Duration = Duration::from_secs(5);

/// The number of sweeps in an idle time.
const SWEEPS: u32 = 4;

/// The longest wait for the answer to the claim of a sweep.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);

impl Roots {
    /// Exports the roots that memory has forgotten, if no other process uses them.
    fn work_off(&self) {
        let now = self.clock.now();
        let due: Vec<_> = {
            let mut all = lock(&self.due);
            let (due, rest) = std::mem::take(&mut *all)
                .into_iter()
                .partition(|due| due.at <= now);
            *all = rest;
            due
        };
        for Due { part, .. } in due {
            if let Some(at) = self.look_at(&part, now) {
                self.add_due(Due { part, at });
            }
        }
    }

    /// Ends a forgotten root, or returns the time at which it is to be looked at again.
    fn look_at(&self, part: &Arc<Part>, now: SystemTime) -> Option<SystemTime> {
        let is_over = lock(&part.progress).ending.is_some();
        if !is_over && self.backing.get().is_some() {
            // Once the storage is dropped, as when a process ends, others may use the root, or find that nobody does.
            let client = self.client()?;
            let is_late = Cell::new(client.is_down());
            Client::begin();
            let on_late = || -> OnLate {
                is_late.set(true);
                Box::new(|_, _| ())
            };
            let there = client.get(part.record_key(), on_late);
            if is_late.get() {
                return Some(now + RETRY);
            }
            if let Some(there) = there.filter(|there| part.is_in_use(there, now)) {
                return Some(there.expires_at + Duration::from_millis(1));
            }
        }
        self.abandon(part, now);
        None
    }

    /// Ends a root that nobody uses, if its end is not told yet.
    fn abandon(&self, part: &Arc<Part>, now: SystemTime) {
        {
            let progress = &mut *lock(&part.progress);
            if progress.stage != Stage::Open {
                return;
            }
            progress.stage = Stage::Closing;
            let (status, at) = (EndStatus::Abandoned, now);
            progress.ending.get_or_insert(Ending { status, at });
        }
        close::close(part);
    }

    /// Looks for roots of instances that no living process has seen, unless another process has just done so.
    fn sweep(self: &Arc<Self>) {
        let Some(idle) = self.backing.get().map(|backing| backing.idle) else {
            return;
        };
        if !self.claims_sweep(idle) {
            return;
        }
        // The client itself is not kept: a storage that is dropped meanwhile must not leave its end to this thread.
        let Some(scanner) = self.client().and_then(|client| client.scanner()) else {
            return;
        };
        let now = self.clock.now();
        let mut found: HashMap<_, Found> = HashMap::new();
        let scanned = scanner.scan(&mut |key, record| {
            let Some((id, span_id, place)) = root_part(key) else {
                return;
            };
            let key = (id.into_owned(), span_id);
            if found.contains_key(&key) || found.len() < MAX_DUE {
                found.entry(key).or_default().add(place, record);
            }
        });
        if scanned.is_err() {
            // A part that was not seen may be in use.
            return;
        }
        for ((id, _), parts) in found {
            if scanner.is_closing() {
                return;
            }
            let Some(part) = parts.unused(self, &id, idle, now) else {
                continue;
            };
            match scanner.get(&part.record_key()) {
                Ok(Some(there)) if part.is_in_use(&there, now) => {}
                Ok(_) => self.abandon(&Arc::new(part), now),
                Err(_) => return,
            }
        }
    }

    /// Returns `true` if this process is the first that wants to sweep.
    fn claims_sweep(&self, idle: Duration) -> bool {
        let token = self.token;
        let trace_id = TraceId::from(u128::from(u64::from_be_bytes(token.to_bytes())));
        let context = SpanContext::new(
            trace_id,
            token,
            TraceFlags::NOT_SAMPLED,
            false,
            TraceState::NONE,
        );
        let now = self.clock.now();
        let Some(context) = WorkflowContext::from_span(&context, now) else {
            return false;
        };
        // Gone when this process wants to sweep the next time.
        let lease = Record::new(context, after(now, idle / SWEEPS / 2));
        let (answer, answered) = sync_channel(1);
        let on_winner = move |there: Record| {
            let _ = answer.try_send(there.context.span_id() == token);
            Vec::new()
        };
        let Some(client) = self.client() else {
            return false;
        };
        client.claim(
            Write::PutIfAbsent(SWEEP_KEY.to_owned(), lease),
            Box::new(on_winner),
        );
        drop(client);
        answered.recv_timeout(CLAIM_PATIENCE).unwrap_or_default()
    }

    /// Returns `true` if it is time to sweep. Nobody sweeps before a root was allocated, which shows that the provider has all
    /// its pieces.
    fn is_sweep_due(&self, now: u32) -> bool {
        let Some(backing) = self.backing.get() else {
            return false;
        };
        if self.opened.load(Relaxed) == 0 || now < self.next_sweep.load(Relaxed) {
            return false;
        }
        let interval = (ticks(backing.idle) / SWEEPS).max(1);
        self.next_sweep.store(now.saturating_add(interval), Relaxed);
        true
    }
}

/// The parts of one root that a sweep has found.
#[derive(Default)]
struct Found {
    first: Option<Record>,
    /// The expiry of the part that was written last.
    latest: Option<SystemTime>,
}

impl Found {
    fn add(&mut self, place: u32, record: Record) {
        self.latest = self.latest.max(Some(record.expires_at));
        if place == FIRST_PLACE {
            self.first = Some(record);
        }
    }

    /// Returns the root if nothing was added to it for an idle time.
    fn unused(self, roots: &Arc<Roots>, id: &str, idle: Duration, now: SystemTime) -> Option<Part> {
        // Parts are not extended, so the rest of its lifetime tells when one was written. In its last idle time the claim of the
        // end may have expired before it.
        let left = self.latest?.duration_since(now).ok()?;
        let longest = idle.saturating_mul(PART_LIFETIME - 1);
        if left < idle || left > longest {
            return None;
        }
        let record = self.first?;
        let span = *record.root.filter(|root| root.spans != SHUT)?;
        let (run_id, generation) = (record.run_id.as_deref(), record.generation);
        let own = record.context.to_span_context();
        let flags = own.trace_flags();
        let state = own.trace_state().clone();
        let own = SpanContext::new(own.trace_id(), span.span_id, flags, false, state);
        let context = WorkflowContext::from_span(&own, span.started_at)?;
        Some(Part::new(
            roots,
            id,
            run_id,
            generation,
            context,
            span,
            Stage::Open,
        ))
    }
}

impl Part {
    /// Returns `true` if the record found for its instance has this root, so that any process may use it.
    fn is_in_use(&self, there: &Record, now: SystemTime) -> bool {
        let root = there.root.as_deref();
        there.expires_at > now && root.is_some_and(|root| root.span_id == self.span.span_id)
    }
}

impl OnTick for Roots {
    /// Exporting runs foreign code, which must not hold up the ticking thread.
    fn on_tick(&self, now: u32) {
        // Set by this method alone, which one thread calls.
        if self.is_working.load(Acquire) {
            return;
        }
        let sweeps = self.is_sweep_due(now);
        if !sweeps && lock(&self.due).is_empty() {
            return;
        }
        let Some(roots) = self.own.upgrade() else {
            return;
        };
        self.is_working.store(true, Release);
        let thread = thread::Builder::new().name("workflow-context-roots".to_owned());
        let spawned = thread.spawn(move || {
            // A panicking clock must not be the last thing that this is used for.
            let _ = caught(|| roots.work_off());
            if sweeps {
                let _ = caught(|| roots.sweep());
            }
            roots.is_working.store(false, Release);
        });
        if spawned.is_err() {
            self.is_working.store(false, Release);
        }
    }
}
