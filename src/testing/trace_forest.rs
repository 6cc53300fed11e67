//! Finished spans as trees, to print and to assert on.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Link, SpanId, Status, TraceId};
use opentelemetry_sdk::trace::SpanData;

use crate::fields::{RELATION, SPANS, STATUS};

/// Number of levels that are indented. Deeper spans are labelled with their depth: with indentation, the drawing of a
/// long chain would grow with the square of its length.
const MAX_INDENT: usize = 32;

/// Finished spans, arranged as the trees their parent ids describe.
///
/// Any input is accepted: spans in any order, of any number of traces, with missing parents, repeated ids or parents in
/// a cycle. A parent is looked for in the trace of the span only; if its span id is repeated there, the earliest span of
/// that id is the parent.
///
/// # Drawing order
///
/// Traces are ordered by their earliest start. Within a trace, each span is followed by its descendants, with siblings
/// ordered by start, then span id. [`Display`](fmt::Display) and all methods use this order.
///
/// # The drawing
///
/// ```text
/// trace 4bf92f35…  (4 spans, 12.3ms)
/// ├─ run_order  12.3ms  00f067aa…
/// │  ├─ charge_card  4.1ms  b7ad6b71…  (error: card declined)
/// │  └─ charge_card  5.0ms  53995c3f…
/// │        ⇢ link to 0af76519…/e457b5a2… [foreign]
/// └─ ship  1.2ms  c8be7c82…  (parent d75597de… not exported)
/// ```
///
/// Each line has the name, the duration and the first digits of the span id (the last ones, if it starts with zeros). A
/// span whose parent is not among the given spans is drawn as a root, with a note. A link shows its target, its
/// `workflow.relation` attribute and, if the target is among the given spans, the name of the target. Control characters
/// are escaped, and very deep spans are labelled with their depth instead of being indented. Without spans the drawing
/// is `no spans`. The own span of a workflow shows how that ended, such as `[completed]`.
///
/// # Examples
///
/// ```
/// use opentelemetry::trace::{Tracer, TracerProvider};
/// use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
/// use tracing_workflow_context::testing::TraceForest;
///
/// let exporter = InMemorySpanExporter::default();
/// let provider = SdkTracerProvider::builder()
///     .with_simple_exporter(exporter.clone())
///     .build();
/// let tracer = provider.tracer("test");
/// tracer.in_span("run_order", |_| {
///     tracer.in_span("charge_card", |_| {});
/// });
///
/// let forest = TraceForest::from_spans(&exporter.get_finished_spans()?);
/// forest.assert_one_trace().assert_no_orphans();
///
/// assert_eq!(forest.count_by_name()["charge_card"], 1, "{forest}");
/// let charge = forest.find("charge_card").expect("was exported");
/// assert_eq!(forest.parent_of(charge), forest.find("run_order"));
/// # Ok::<(), opentelemetry_sdk::error::OTelSdkError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TraceForest {
    /// All spans, in drawing order.
    nodes: Vec<Node>,
    /// The index of the earliest span of each id.
    by_id: HashMap<Id, usize>,
}

impl TraceForest {
    /// Arranges copies of `spans`.
    ///
    /// ```
    /// use tracing_workflow_context::testing::TraceForest;
    ///
    /// assert_eq!(TraceForest::from_spans(&[]).to_string(), "no spans");
    /// ```
    pub fn from_spans(spans: &[SpanData]) -> Self {
        let spans = sorted(spans);
        let mut earliest = HashMap::new();
        for (i, span) in spans.iter().enumerate() {
            earliest.entry(id(span)).or_insert(i);
        }
        let parents = parents(&spans, &earliest);

        let mut roots = Vec::new();
        let mut children = vec![Vec::new(); spans.len()];
        for (i, parent) in parents.iter().enumerate() {
            match *parent {
                Some(parent) => children[parent].push(i),
                None => roots.push(i),
            }
        }

        let mut nodes = Vec::with_capacity(spans.len());
        let mut by_id = HashMap::with_capacity(earliest.len());
        // An explicit stack, since recursion could overflow the thread's stack.
        let mut todo = Vec::new();
        for roots in roots.chunk_by(|&a, &b| trace_id(spans[a]) == trace_id(spans[b])) {
            push_siblings(&mut todo, roots, 0);
            while let Some((i, depth, last)) = todo.pop() {
                let repeated = earliest[&id(spans[i])] != i;
                if !repeated {
                    by_id.insert(id(spans[i]), nodes.len());
                }
                nodes.push(Node {
                    span: spans[i].clone(),
                    repeated,
                    depth,
                    last,
                });
                push_siblings(&mut todo, &children[i], depth + 1);
            }
        }
        Self { nodes, by_id }
    }

    /// Returns the number of traces.
    pub fn trace_count(&self) -> usize {
        self.traces().count()
    }

    /// Returns the number of spans, repeated ones included.
    pub fn span_count(&self) -> usize {
        self.nodes.len()
    }

    /// Returns the id of each trace, in drawing order.
    pub fn trace_ids(&self) -> Vec<TraceId> {
        self.traces()
            .map(|nodes| trace_id(&nodes[0].span))
            .collect()
    }

    /// Iterates over all spans, in drawing order.
    pub fn spans(&self) -> impl Iterator<Item = &SpanData> {
        self.nodes.iter().map(|node| &node.span)
    }

    /// Returns the first span of this name, in drawing order.
    pub fn find(&self, name: &str) -> Option<&SpanData> {
        self.spans().find(|span| span.name == name)
    }

    /// Returns the parent of a span.
    ///
    /// `None` for a root, for a span whose parent is not in the forest, and for the one span of a cycle that is drawn
    /// as a root, so the way from parent to parent always ends.
    pub fn parent_of(&self, span: &SpanData) -> Option<&SpanData> {
        let cut = self
            .get(id(span))
            .is_some_and(|own| own.depth == 0 && own.span.parent_span_id == span.parent_span_id);
        let parent = parent_id(span).filter(|_| !cut)?;
        self.get(parent).map(|node| &node.span)
    }

    /// Returns the number of spans of each name.
    ///
    /// Use it to assert how often something ran, or was exported. A replay that exports an activity twice looks like a
    /// retry of that activity: two spans of one name under one parent. The test knows which of them it expects.
    pub fn count_by_name(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for span in self.spans() {
            *counts.entry(span.name.to_string()).or_default() += 1;
        }
        counts
    }

    /// Asserts that there are spans, and that all of them are in one trace.
    ///
    /// # Panics
    ///
    /// If there are several traces, or no spans. The message ends with the drawing.
    #[track_caller]
    pub fn assert_one_trace(&self) -> &Self {
        let traces = self.trace_count();
        assert!(
            traces == 1,
            "expected one trace, found {traces}:\n\n{self}\n"
        );
        self
    }

    /// Asserts that every span is a root or has its parent in the forest.
    ///
    /// A remote parent has to be in the forest too: the test has to collect the spans of the process that exported it. A
    /// span without a parent id is a root. A cycle of parents passes, since none of them is missing.
    ///
    /// # Panics
    ///
    /// If the parent of a span is not in the forest. The message ends with the drawing.
    #[track_caller]
    pub fn assert_no_orphans(&self) -> &Self {
        let orphans = self
            .nodes
            .iter()
            .filter(|node| self.is_orphan(node))
            .count();
        assert!(
            orphans == 0,
            "expected the parent of every span, but {} missing:\n\n{self}\n",
            counted(orphans, "is", "are"),
        );
        self
    }

    /// Asserts that no two spans have the same trace id and span id, as if one was exported twice.
    ///
    /// Work that was done, or traced, twice has two span ids and passes: see [`count_by_name`](Self::count_by_name).
    ///
    /// # Panics
    ///
    /// If a span id is repeated within its trace. The message ends with the drawing.
    #[track_caller]
    pub fn assert_no_duplicates(&self) -> &Self {
        let repeated = self.nodes.iter().filter(|node| node.repeated).count();
        assert!(
            repeated == 0,
            "expected every span id once, but {}:\n\n{self}\n",
            counted(repeated, "span repeats one", "spans repeat one"),
        );
        self
    }

    /// Asserts that each trace is whole: it has one root, every parent is in the forest, and no span starts before the root or
    /// ends after it. So it is with durable roots once a workflow has ended.
    ///
    /// # Panics
    ///
    /// If there are no spans, or a trace is not whole. The message names the first deviation, and ends with the drawing.
    #[track_caller]
    pub fn assert_rooted(&self) -> &Self {
        assert!(!self.nodes.is_empty(), "expected a trace, found no spans");
        self.assert_no_orphans();
        for trace in self.traces() {
            let roots = trace.iter().filter(|node| node.depth == 0).count();
            let root = &trace[0].span;
            let id = short(trace_id(root));
            assert!(
                roots == 1,
                "expected one root in trace {id}, found {roots}:\n\n{self}\n"
            );
            let is_outside = |node: &&Node| {
                node.span.start_time < root.start_time || node.span.end_time > root.end_time
            };
            if let Some(outside) = trace.iter().find(is_outside) {
                let name = escaped(&outside.span.name);
                panic!(
                    "expected all of trace {id} within the time of its root, but {name} is not:\n\n{self}\n"
                );
            }
        }
        self
    }

    fn traces(&self) -> impl Iterator<Item = &[Node]> {
        self.nodes
            .chunk_by(|a, b| trace_id(&a.span) == trace_id(&b.span))
    }

    fn get(&self, id: Id) -> Option<&Node> {
        self.by_id.get(&id).map(|&i| &self.nodes[i])
    }

    fn is_orphan(&self, node: &Node) -> bool {
        parent_id(&node.span).is_some_and(|parent| !self.by_id.contains_key(&parent))
    }

    fn fmt_trace(&self, f: &mut fmt::Formatter<'_>, nodes: &[Node]) -> fmt::Result {
        let first = &nodes[0].span;
        let start = nodes.iter().map(|node| node.span.start_time);
        let end = nodes.iter().map(|node| node.span.end_time);
        write!(
            f,
            "trace {}  ({}, {})",
            short(trace_id(first)),
            counted(nodes.len(), "span", "spans"),
            elapsed(
                start.fold(first.start_time, SystemTime::min),
                end.fold(first.end_time, SystemTime::max)
            ),
        )?;
        // For each span from the root to the current one, `true` if it is the last of its siblings.
        let mut path = Vec::new();
        for (i, node) in nodes.iter().enumerate() {
            path.truncate(node.depth);
            write!(f, "\n{}", indent(&path))?;
            self.fmt_node(f, node)?;
            path.push(node.last);
            let has_children = nodes.get(i + 1).is_some_and(|next| next.depth > node.depth);
            for link in node.span.links.iter() {
                let rail = if has_children { "│  " } else { "   " };
                write!(f, "\n{}{rail}", indent(&path))?;
                self.fmt_link(f, link)?;
            }
        }
        Ok(())
    }

    fn fmt_node(&self, f: &mut fmt::Formatter<'_>, node: &Node) -> fmt::Result {
        let span = &node.span;
        if node.depth > MAX_INDENT {
            write!(f, "[depth {}] ", node.depth)?;
        }
        write!(
            f,
            "{} {}  {}  {}",
            if node.last { "└─" } else { "├─" },
            escaped(&span.name),
            elapsed(span.start_time, span.end_time),
            short(span.span_context.span_id()),
        )?;
        if let Some(status) = own_status(span) {
            write!(f, "  [{}]", escaped(&status))?;
        }
        if let Status::Error { description } = &span.status {
            let colon = if description.is_empty() { "" } else { ": " };
            write!(f, "  (error{colon}{})", escaped(description))?;
        }
        if node.depth == 0 && parent_id(span).is_some() {
            let parent = short(span.parent_span_id);
            match (self.is_orphan(node), span.parent_span_is_remote) {
                (false, _) => write!(f, "  (parent {parent} in a cycle)")?,
                (true, true) => write!(f, "  (remote parent {parent})")?,
                (true, false) => write!(f, "  (parent {parent} not exported)")?,
            }
        }
        if node.repeated {
            f.write_str("  (repeated span id)")?;
        }
        Ok(())
    }

    fn fmt_link(&self, f: &mut fmt::Formatter<'_>, link: &Link) -> fmt::Result {
        let target = (link.span_context.trace_id(), link.span_context.span_id());
        write!(f, "⇢ link to {}/{}", short(target.0), short(target.1))?;
        if let Some(relation) = link
            .attributes
            .iter()
            .find(|kv| kv.key.as_str() == RELATION)
        {
            write!(f, " [{}]", escaped(&relation.value.as_str()))?;
        }
        if let Some(node) = self.get(target) {
            write!(f, " {}", escaped(&node.span.name))?;
        }
        Ok(())
    }
}

impl fmt::Display for TraceForest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nodes.is_empty() {
            return f.write_str("no spans");
        }
        for (i, nodes) in self.traces().enumerate() {
            if i > 0 {
                f.write_str("\n\n")?;
            }
            self.fmt_trace(f, nodes)?;
        }
        Ok(())
    }
}

/// A span and its place in the drawing.
#[derive(Clone, Debug)]
struct Node {
    span: SpanData,
    /// An earlier span of the same trace has the same id.
    repeated: bool,
    depth: usize,
    /// It is the last of its siblings.
    last: bool,
}

type Id = (TraceId, SpanId);

fn trace_id(span: &SpanData) -> TraceId {
    span.span_context.trace_id()
}

fn id(span: &SpanData) -> Id {
    (trace_id(span), span.span_context.span_id())
}

fn parent_id(span: &SpanData) -> Option<Id> {
    (span.parent_span_id != SpanId::INVALID).then(|| (trace_id(span), span.parent_span_id))
}

/// Returns the status of a workflow that its own span tells, which alone has a number of spans.
fn own_status(span: &SpanData) -> Option<String> {
    let value = |name| span.attributes.iter().find(|kv| kv.key.as_str() == name);
    value(SPANS)?;
    Some(value(STATUS)?.value.as_str().into_owned())
}

/// Sorts spans by trace, and in each trace in the order in which siblings are drawn.
fn sorted(spans: &[SpanData]) -> Vec<&SpanData> {
    let mut spans: Vec<_> = spans.iter().collect();
    spans.sort_by_key(|span| {
        let (trace, own) = id(span);
        (span.start_time, trace.to_bytes(), own.to_bytes())
    });
    let mut traces = HashMap::new();
    for span in &spans {
        let next = traces.len();
        traces.entry(trace_id(span)).or_insert(next);
    }
    // A stable sort, which keeps the order within a trace.
    spans.sort_by_key(|span| traces[&trace_id(span)]);
    spans
}

/// Returns the index of each span's parent, unless it is missing or would close a cycle.
fn parents(spans: &[&SpanData], earliest: &HashMap<Id, usize>) -> Vec<Option<usize>> {
    let mut parents: Vec<_> = spans
        .iter()
        .map(|span| earliest.get(&parent_id(span)?).copied())
        .collect();
    // The climb that reached each span first. A climb that meets its own trail has found a cycle, which is cut there.
    // Each climb stops at the trail of any other, so each span is passed once.
    let mut trail = vec![None; spans.len()];
    for climb in 0..spans.len() {
        let mut at = climb;
        while let (None, Some(parent)) = (trail[at], parents[at]) {
            trail[at] = Some(climb);
            at = parent;
        }
        if trail[at] == Some(climb) {
            parents[at] = None;
        }
    }
    parents
}

/// Pushes siblings so that the first one is popped first.
fn push_siblings(stack: &mut Vec<(usize, usize, bool)>, siblings: &[usize], depth: usize) {
    let last = siblings.last();
    stack.extend(siblings.iter().rev().map(|i| (*i, depth, Some(i) == last)));
}

fn indent(path: &[bool]) -> String {
    path.iter()
        .take(MAX_INDENT)
        .map(|&last| if last { "   " } else { "│  " })
        .collect()
}

/// Shortens an id to its first eight digits, or to the last ones if it starts with zeros, as ids that a test counts do.
fn short(id: impl fmt::Display) -> String {
    let hex = id.to_string();
    if hex.starts_with("00000000") {
        format!("…{}", &hex[hex.len() - 8..])
    } else {
        format!("{}…", &hex[..8])
    }
}

fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// Formats a duration, which is negative if the clock was set back meanwhile.
fn elapsed(start: SystemTime, end: SystemTime) -> String {
    end.duration_since(start)
        .map_or_else(|before| format!("-{}", human(before.duration())), human)
}

/// Formats a duration of up to days, which `Debug` would print in seconds.
fn human(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..60 => format!("{duration:.1?}"),
        60..3_600 => format!("{}m {:02}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h {:02}m", s / 3_600, s / 60 % 60),
        _ => format!("{}d {:02}h", s / 86_400, s / 3_600 % 24),
    }
}

/// Escapes characters that would break the line or reorder it on a terminal.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.extend(c.escape_unicode()),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}
