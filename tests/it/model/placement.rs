//! Where a span goes when it starts, and what an id that comes late does: the table at `Relation`, and the rules of the front
//! page on runs, pollers, parent instances and `max_spans`.

use std::collections::BTreeMap;

use super::{Names, Number};

/// As many older runs, and as many older traces of each run, are kept.
const OLDER: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Root,
    Natural(Number),
    Stored(Number),
}

/// The parent that a span has without this crate; the span itself if it has started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Natural {
    pub(super) span: Number,
    /// It is known by what is stored of it.
    pub(super) is_stored: bool,
    pub(super) trace: Number,
    /// A live poller is in that trace.
    pub(super) is_polled: bool,
}

/// A relation and its target.
type Link = (&'static str, Number);

pub(super) struct Placed {
    pub(super) parent: Origin,
    /// By the number of its root.
    pub(super) trace: Number,
    pub(super) links: Vec<Link>,
    /// Told by the root of a second, third, ... trace.
    pub(super) generation: Option<i64>,
}

/// The recorded spans of all instances.
pub(super) struct Instances {
    max_spans: Option<u64>,
    /// The runs of each, the latest last.
    runs: BTreeMap<&'static str, Vec<Run>>,
}

struct Run {
    name: Option<&'static str>,
    span: Number,
    trace: Number,
    /// The traces of its earlier generations.
    older_traces: Vec<Number>,
    generation: i64,
    spans: u64,
}

impl Placed {
    pub(super) fn by_nature(span: Number, natural: Option<Natural>) -> Self {
        match natural {
            Some(natural) => Self {
                parent: match natural.is_stored {
                    true => Origin::Stored(natural.span),
                    false => Origin::Natural(natural.span),
                },
                trace: natural.trace,
                links: Vec::new(),
                generation: None,
            },
            None => Self::root(span),
        }
    }

    fn root(span: Number) -> Self {
        Self {
            parent: Origin::Root,
            trace: span,
            links: Vec::new(),
            generation: None,
        }
    }

    /// Beneath a recorded span, with a link to where it came from.
    fn beneath(stored: (Number, Number), why: &'static str, foreign: Option<Natural>) -> Self {
        Self {
            parent: Origin::Stored(stored.0),
            trace: stored.1,
            links: foreign.map(|from| (why, from.span)).into_iter().collect(),
            generation: None,
        }
    }
}

impl Instances {
    pub(super) fn new(max_spans: Option<u64>) -> Self {
        Self {
            max_spans,
            runs: BTreeMap::new(),
        }
    }

    /// The recorded span of the latest run, and its trace.
    pub(super) fn latest(&self, id: &str) -> Option<(Number, Number)> {
        let latest = self.runs.get(id)?.last()?;
        Some((latest.span, latest.trace))
    }

    /// The table "What becomes of a tagged span".
    pub(super) fn place(&mut self, span: Number, names: Names, natural: Option<Natural>) -> Placed {
        let id = names.id.expect("a name");
        // The first run that is named names the one that was recorded without a name.
        if let (Some(run), Some(latest)) = (names.run, self.latest_run(id)) {
            latest.name.get_or_insert(run);
        }
        let foreign = natural.filter(|natural| !natural.is_polled);
        let Some(runs) = self.runs.get_mut(id) else {
            let placed = self.place_first(span, names, natural, foreign);
            self.record(id, names.run, span, placed.trace);
            return placed;
        };
        let is_nested = natural.is_some_and(|natural| runs.iter().any(|r| r.has(natural.trace)));
        let latest = runs.len() - 1;
        let known = match names.run {
            None => Some(latest),
            Some(name) => runs.iter().position(|run| run.name == Some(name)),
        };
        let run = &mut runs[known.unwrap_or(latest)];
        let stored = (run.span, run.trace);
        let new_root = |why| {
            let request = foreign.map(|from| ("foreign", from.span));
            let links = std::iter::once((why, stored.0)).chain(request);
            Placed {
                links: links.collect(),
                ..Placed::root(span)
            }
        };
        if known.is_none() {
            let placed = match is_nested {
                true => Placed::by_nature(span, natural),
                false => new_root("new_run"),
            };
            self.record(id, names.run, span, placed.trace);
            return placed;
        }
        if is_nested {
            return Placed::by_nature(span, natural);
        }
        if self.max_spans.is_some_and(|max| run.spans >= max) {
            run.continue_in(span);
            return Placed {
                generation: Some(run.generation),
                ..new_root("expired")
            };
        }
        run.spans += 1;
        Placed::beneath(stored, "foreign", foreign)
    }

    /// Nothing is stored for the instance.
    fn place_first(
        &self,
        span: Number,
        names: Names,
        natural: Option<Natural>,
        foreign: Option<Natural>,
    ) -> Placed {
        let parent = names.parent.and_then(|id| self.latest(id));
        let is_elsewhere =
            |parent: &(Number, Number)| natural.is_none_or(|natural| natural.trace != parent.1);
        match (parent.filter(is_elsewhere), natural) {
            (Some(parent), _) => Placed::beneath(parent, "child", foreign),
            (None, Some(natural)) if natural.is_polled => Placed::root(span),
            (None, natural) => Placed::by_nature(span, natural),
        }
    }

    /// A started span tells its instance and run. Its parent can no longer change: it is recorded, or linked.
    pub(super) fn join_late(
        &mut self,
        id: &'static str,
        run: Option<&'static str>,
        own: Natural,
    ) -> Option<Link> {
        if let (Some(run), Some(latest)) = (run, self.latest_run(id)) {
            latest.name.get_or_insert(run);
        }
        let Some(runs) = self.runs.get(id) else {
            // A poller's trace never becomes an instance's.
            if !own.is_polled {
                self.record(id, run, own.span, own.trace);
            }
            return None;
        };
        let is_nested = runs.iter().any(|run| run.has(own.trace));
        let latest = runs.last().expect("a run");
        let known = match run {
            None => Some(latest),
            Some(name) => runs.iter().find(|run| run.name == Some(name)),
        };
        let (why, stored) = match known {
            Some(known) => ("late", known.span),
            None => ("new_run", latest.span),
        };
        if known.is_none() && (is_nested || !own.is_polled) {
            self.record(id, run, own.span, own.trace);
        }
        (!is_nested).then_some((why, stored))
    }

    fn latest_run(&mut self, id: &str) -> Option<&mut Run> {
        self.runs.get_mut(id)?.last_mut()
    }

    fn record(
        &mut self,
        id: &'static str,
        name: Option<&'static str>,
        span: Number,
        trace: Number,
    ) {
        let runs = self.runs.entry(id).or_default();
        if runs.len() > OLDER {
            runs.remove(0);
        }
        runs.push(Run {
            name,
            span,
            trace,
            older_traces: Vec::new(),
            generation: 1,
            spans: 1,
        });
    }
}

impl Run {
    fn has(&self, trace: Number) -> bool {
        self.trace == trace || self.older_traces.contains(&trace)
    }

    /// Goes on in a new trace.
    fn continue_in(&mut self, root: Number) {
        if self.older_traces.len() == OLDER {
            self.older_traces.remove(0);
        }
        self.older_traces.push(self.trace);
        (self.span, self.trace) = (root, root);
        self.generation += 1;
        self.spans = 1;
    }
}
