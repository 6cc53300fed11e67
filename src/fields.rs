//! The reserved field names, the engine presets, and the reading of them from spans, records and events.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use opentelemetry::trace::Event;
use opentelemetry::{KeyValue, Value};
use tracing::field::{Field, Visit};
use tracing::{Metadata, span};

use crate::error::{InvalidInstanceId, MAX_INSTANCE_ID_BYTES};

// Read from spans.
pub(crate) const INSTANCE_ID: &str = "workflow.instance_id";
pub(crate) const RUN_ID: &str = "workflow.run_id";
pub(crate) const PARENT_INSTANCE_ID: &str = "workflow.parent_instance_id";
pub(crate) const REPLAYING: &str = "workflow.replaying";
pub(crate) const STATUS: &str = "workflow.status";
// Written to spans and links.
pub(crate) const RESUMED: &str = "workflow.resumed";
pub(crate) const RELATION: &str = "workflow.relation";
pub(crate) const AGENT_NAME: &str = "agent.name";

/// The values of `workflow.status` after which an instance does no more work, in any letter case.
const TERMINAL: [&str; 6] = [
    "completed",
    "failed",
    "terminated",
    "canceled",
    "cancelled",
    "timed_out",
];

/// A durable-workflow engine whose own fields and spans are known.
///
/// | engine | instance id | run id | status | engine spans that are held back |
/// |---|---|---|---|---|
/// | `Dapr` | `durabletask.task.instance_id` | | `durabletask.runtime_status` | |
/// | `Duroxide` | `instance_id` | | | |
/// | `Restate` | | | | `restate_sdk_endpoint_handle` |
/// | `Temporal` | `temporalWorkflowID` | `temporalRunID` | | `RunWorkflow` |
///
/// None has a replay field: where an engine tells of a replay at all, new work follows in the same span.
/// The reserved fields of this crate keep their meaning beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// Dapr Workflow through `dapr-durabletask`.
    Dapr,
    /// `duroxide`.
    Duroxide,
    /// Restate through `restate-sdk`.
    Restate,
    /// Temporal through `temporalio-sdk`.
    Temporal,
}

/// What is known of an engine, each value with the upstream source that it was read from.
struct Preset {
    instance_id: Option<&'static str>,
    run_id: Option<&'static str>,
    status: Option<&'static str>,
    /// Name and target of a span that the engine opens around user code without an instance id.
    span: Option<(&'static str, &'static str)>,
}

impl Engine {
    fn preset(self) -> Preset {
        match self {
            // dapr-durabletask 0.0.4, src/internal/otel.rs:130-186: the raw OpenTelemetry spans of its feature
            // `opentelemetry` carry the id from their start, and have good parents where the sidecar hands the
            // context on. They tell the status of the workflow on its last turn.
            Self::Dapr => Preset {
                instance_id: Some("durabletask.task.instance_id"),
                run_id: None,
                status: Some("durabletask.runtime_status"),
                span: None,
            },
            // duroxide 0.1.32 opens no spans; its events, and by its documentation its users, say `instance_id`.
            Self::Duroxide => Preset {
                instance_id: Some("instance_id"),
                run_id: None,
                status: None,
                span: None,
            },
            // restate-sdk 0.13.0, src/endpoint/mod.rs:595: one span around each attempt. Its
            // `restate.sdk.is_replaying` is no replay field: the attempt that begins with a replay goes on to
            // do new work, and src/endpoint/context.rs:69 records the flag on whatever span is current.
            Self::Restate => Preset {
                instance_id: None,
                run_id: None,
                status: None,
                span: Some(("restate_sdk_endpoint_handle", "restate_sdk::endpoint")),
            },
            // temporalio-sdk 1.1.1: `RunActivity` (src/lib.rs:1506) records both ids within its first poll;
            // `RunWorkflow` (src/workflow_future.rs:75), entered around each poll of user code, has none. No
            // field tells of a replay, and a poll that begins with one goes on to do new work.
            Self::Temporal => Preset {
                instance_id: Some("temporalWorkflowID"),
                run_id: Some("temporalRunID"),
                status: None,
                span: Some(("RunWorkflow", "temporalio_sdk::workflow_future")),
            },
        }
    }
}

/// Which field has which meaning in one storage.
#[derive(Clone, Debug)]
pub(crate) struct Fields {
    named: Vec<(Cow<'static, str>, Meaning)>,
    /// Bit n is set when some field name has n bytes (63: or more): most attributes end here.
    lengths: u64,
    engine_spans: Vec<EngineSpan>,
}

/// Ranks are positions in the builder's order: of several ids on one span the lowest rank counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    InstanceId { rank: u16 },
    RunId,
    ParentInstanceId,
    Replaying,
    Status,
}

#[derive(Clone, Debug)]
struct EngineSpan {
    name: Cow<'static, str>,
    target: Option<&'static str>,
}

/// What the layer needs to know of a span before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nothing that concerns this crate.
    Ordinary,
    /// Declares a reserved field.
    Tagged,
    /// An engine's own span around user code, which waits for the instance of its first child.
    Engine,
}

/// What all spans of one callsite have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Callsite {
    pub(crate) role: Role,
    pub(crate) declares: Ids,
}

/// The callsites that were looked at before, each in the slot to which its address hashes. One whose slot is taken is
/// looked at each time.
#[derive(Debug)]
pub(crate) struct Callsites {
    /// The address and, below it, a [`Callsite`] in four bits: no machine has addresses of more than 60.
    slots: Box<[AtomicU64; Self::SLOTS]>,
}

impl Callsites {
    const SLOTS: usize = 1024;

    pub(crate) fn new() -> Self {
        Self {
            slots: Box::new([const { AtomicU64::new(0) }; Self::SLOTS]),
        }
    }

    /// Whether spans of the callsite are certainly none of this crate's business.
    #[inline]
    pub(crate) fn are_ordinary(&self, metadata: &'static Metadata<'static>) -> bool {
        let (slot, address) = self.slot(metadata);
        slot.load(Relaxed) == address
    }

    #[inline]
    pub(crate) fn get(&self, metadata: &'static Metadata<'static>, fields: &Fields) -> Callsite {
        let (slot, address) = self.slot(metadata);
        match slot.load(Relaxed) ^ address {
            bits @ 0..16 => Callsite::from_bits(bits),
            _ => Self::add(slot, address, fields.callsite(metadata)),
        }
    }

    #[inline]
    fn slot(&self, metadata: &'static Metadata<'static>) -> (&AtomicU64, u64) {
        let address = (std::ptr::from_ref(metadata).addr() as u64) << 4;
        let hash = address.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (&self.slots[(hash >> 54) as usize % Self::SLOTS], address)
    }

    #[cold]
    fn add(slot: &AtomicU64, address: u64, callsite: Callsite) -> Callsite {
        let known = address | callsite.to_bits();
        // If it is taken the loser is looked at again.
        let _ = slot.compare_exchange(0, known, Relaxed, Relaxed);
        callsite
    }
}

impl Callsite {
    #[inline]
    fn from_bits(bits: u64) -> Self {
        Self {
            role: match bits & 3 {
                0 => Role::Ordinary,
                1 => Role::Tagged,
                _ => Role::Engine,
            },
            declares: Ids {
                id: bits & 4 != 0,
                run: bits & 8 != 0,
            },
        }
    }

    fn to_bits(self) -> u64 {
        self.role as u64 | u64::from(self.declares.id) << 2 | u64::from(self.declares.run) << 3
    }
}

impl Fields {
    pub(crate) fn new(instance_ids: Vec<Cow<'static, str>>) -> Self {
        let mut fields = Self {
            named: Vec::new(),
            lengths: 0,
            engine_spans: Vec::new(),
        };
        for name in instance_ids {
            fields.add_instance_id(name);
        }
        fields.add(RUN_ID.into(), Meaning::RunId);
        fields.add(PARENT_INSTANCE_ID.into(), Meaning::ParentInstanceId);
        fields.add(REPLAYING.into(), Meaning::Replaying);
        fields.add(STATUS.into(), Meaning::Status);
        fields
    }

    /// The name under which an adopted span is told its instance.
    pub(crate) fn primary_instance_id(&self) -> Cow<'static, str> {
        self.named
            .first()
            .map_or(INSTANCE_ID.into(), |(name, _)| name.clone())
    }

    pub(crate) fn add_engine(&mut self, engine: Engine) {
        let preset = engine.preset();
        if let Some(name) = preset.instance_id {
            self.add_instance_id(name.into());
        }
        if let Some(name) = preset.run_id {
            self.add(name.into(), Meaning::RunId);
        }
        if let Some(name) = preset.status {
            self.add(name.into(), Meaning::Status);
        }
        if let Some((name, target)) = preset.span {
            self.engine_spans.push(EngineSpan {
                name: name.into(),
                target: Some(target),
            });
        }
    }

    pub(crate) fn add_engine_span(&mut self, name: Cow<'static, str>) {
        self.engine_spans.push(EngineSpan { name, target: None });
    }

    pub(crate) fn add_replaying(&mut self, name: Cow<'static, str>) {
        self.add(name, Meaning::Replaying);
    }

    fn add_instance_id(&mut self, name: Cow<'static, str>) {
        let rank = u16::try_from(self.named.len()).unwrap_or(u16::MAX);
        self.add(name, Meaning::InstanceId { rank });
    }

    fn add(&mut self, name: Cow<'static, str>, meaning: Meaning) {
        if self.meaning(&name).is_none() {
            self.lengths |= length_bit(&name);
            self.named.push((name, meaning));
        }
    }

    #[inline]
    fn meaning(&self, name: &str) -> Option<Meaning> {
        if !self.may_mean(name) {
            return None;
        }
        let found = self.named.iter().find(|(known, _)| known == name);
        found.map(|(_, meaning)| *meaning)
    }

    fn callsite(&self, metadata: &Metadata<'_>) -> Callsite {
        let named = |span: &EngineSpan| {
            span.name == metadata.name() && span.target.is_none_or(|t| t == metadata.target())
        };
        let mut declares = Ids::default();
        let mut is_tagged = false;
        for field in metadata.fields() {
            let meaning = self.meaning(field.name());
            is_tagged |= meaning.is_some();
            declares.add(meaning);
        }
        let role = if self.engine_spans.iter().any(named) {
            Role::Engine
        } else if is_tagged {
            Role::Tagged
        } else {
            Role::Ordinary
        };
        Callsite { role, declares }
    }

    /// Whether that may be the name of a field with a meaning. Nearly always it is not, and this costs next to nothing.
    #[inline]
    pub(crate) fn may_mean(&self, name: &str) -> bool {
        self.lengths & length_bit(name) != 0
    }

    /// The instance id, where the attributes say just that and nothing else.
    #[inline]
    pub(crate) fn only_id<'a>(&self, attributes: &'a [KeyValue]) -> Option<Cow<'a, str>> {
        let mut may_mean = (attributes.iter()).filter(|a| self.may_mean(a.key.as_str()));
        let (first, None) = (may_mean.next()?, may_mean.next()) else {
            return None;
        };
        match self.meaning(first.key.as_str()) {
            Some(Meaning::InstanceId { .. }) => Some(printed(&first.value)),
            _ => None,
        }
        .filter(|id| InvalidInstanceId::check(id).is_ok())
    }

    /// Reads what a span that is about to start says of its instance.
    pub(crate) fn tag_of<'a>(&self, attributes: &'a [KeyValue]) -> Tag<'a> {
        let mut tag = Tag::default();
        for attribute in attributes {
            if let Some(meaning) = self.meaning(attribute.key.as_str()) {
                tag.take(meaning, &attribute.value);
            }
        }
        tag
    }

    /// Whether one of the events reports a terminal status.
    pub(crate) fn any_terminal(&self, events: &[Event]) -> bool {
        events
            .iter()
            .any(|event| self.tag_of(&event.attributes).terminal)
    }

    /// Reads the ids from a span that is being created, or from what is recorded on one.
    pub(crate) fn identify(&self, record: impl FnOnce(&mut dyn Visit)) -> Option<Identity> {
        let mut visitor = IdentityVisitor {
            fields: self,
            rank: u16::MAX,
            instance_id: None,
            run_id: None,
            parent_instance_id: None,
        };
        record(&mut visitor);
        Some(Identity {
            instance_id: visitor.instance_id?,
            run_id: visitor.run_id,
            parent_instance_id: visitor.parent_instance_id,
        })
    }

    /// Which of the declared ids have no value yet. To print each only to see whether it prints nothing would cost every
    /// span more than it is worth: just a plain text tells that it is empty.
    pub(crate) fn awaits(&self, declared: Ids, attributes: &span::Attributes<'_>) -> Ids {
        let mut visitor = IsThere {
            fields: self,
            found: Ids::default(),
        };
        attributes.record(&mut visitor);
        Ids {
            id: declared.id && !visitor.found.id,
            run: declared.run && !visitor.found.run,
        }
    }

    /// Which ids a record gives a value to.
    pub(crate) fn recorded(&self, values: &span::Record<'_>) -> Ids {
        let mut visitor = HasValue {
            fields: self,
            found: Ids::default(),
        };
        values.record(&mut visitor);
        visitor.found
    }
}

/// Which kinds of id a span has, or waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) id: bool,
    pub(crate) run: bool,
}

impl Ids {
    #[inline]
    fn add(&mut self, meaning: Option<Meaning>) {
        self.id |= matches!(meaning, Some(Meaning::InstanceId { .. }));
        self.run |= meaning == Some(Meaning::RunId);
    }
}

/// An instance, with its run and its parent where those are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) instance_id: Box<str>,
    pub(crate) run_id: Option<Box<str>>,
    pub(crate) parent_instance_id: Option<Box<str>>,
}

/// The same, of somebody else's strings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names<'a> {
    pub(crate) instance_id: &'a str,
    pub(crate) run_id: Option<&'a str>,
    pub(crate) parent_instance_id: Option<&'a str>,
}

impl<'a> Names<'a> {
    pub(crate) fn of(instance_id: &'a str) -> Self {
        Self {
            instance_id,
            run_id: None,
            parent_instance_id: None,
        }
    }

    pub(crate) fn to_identity(self) -> Identity {
        Identity {
            instance_id: self.instance_id.into(),
            run_id: self.run_id.map(Box::from),
            parent_instance_id: self.parent_instance_id.map(Box::from),
        }
    }
}

impl Identity {
    pub(crate) fn names(&self) -> Names<'_> {
        Names {
            instance_id: &self.instance_id,
            run_id: self.run_id.as_deref(),
            parent_instance_id: self.parent_instance_id.as_deref(),
        }
    }
}

/// What the attributes of one span say.
#[derive(Debug, Default)]
pub(crate) struct Tag<'a> {
    pub(crate) instance_id: Option<Cow<'a, str>>,
    pub(crate) run_id: Option<Cow<'a, str>>,
    pub(crate) parent_instance_id: Option<Cow<'a, str>>,
    pub(crate) replaying: Option<bool>,
    pub(crate) terminal: bool,
    /// An id that was longer than [`MAX_INSTANCE_ID_BYTES`], and does not count.
    pub(crate) oversized: Option<Cow<'a, str>>,
    rank: u16,
}

impl<'a> Tag<'a> {
    #[inline]
    pub(crate) fn names(&self) -> Option<Names<'_>> {
        Some(Names {
            instance_id: self.instance_id.as_deref()?,
            run_id: self.run_id.as_deref(),
            parent_instance_id: self.parent_instance_id.as_deref(),
        })
    }

    fn take(&mut self, meaning: Meaning, value: &'a Value) {
        match meaning {
            Meaning::Replaying => self.replaying = truth(value).or(self.replaying),
            Meaning::Status => self.terminal |= is_terminal(value),
            Meaning::InstanceId { rank } => {
                if self.instance_id.is_none() || rank <= self.rank {
                    if let Some(id) = self.id(value) {
                        self.instance_id = Some(id);
                        self.rank = rank;
                    }
                }
            }
            Meaning::RunId => self.run_id = self.id(value).or(self.run_id.take()),
            Meaning::ParentInstanceId => {
                self.parent_instance_id = self.id(value).or(self.parent_instance_id.take());
            }
        }
    }

    fn id(&mut self, value: &'a Value) -> Option<Cow<'a, str>> {
        let id = printed(value);
        match InvalidInstanceId::check(&id) {
            Ok(()) => Some(id),
            Err(InvalidInstanceId::Empty) => None,
            Err(InvalidInstanceId::TooLong { .. }) => {
                self.oversized = Some(id);
                None
            }
        }
    }
}

/// What a value prints, a debug-printed string without its quotes.
fn printed(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => unquoted(text.as_str()),
        other => Cow::Owned(other.to_string()),
    }
}

/// Undoes `{:?}` of a string; whatever is not the `Debug` form of a string stays as it is.
///
/// An attribute no longer tells `%` from `?`, and both must name the same instance.
#[inline]
fn unquoted(text: &str) -> Cow<'_, str> {
    if !text.starts_with('"') {
        return Cow::Borrowed(text);
    }
    // The longest escape of one byte is six characters, `\u{7f}`: a longer text is oversized in any case.
    const LONGEST: usize = 6 * MAX_INSTANCE_ID_BYTES + 2;
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    let Some(inner) = inner.filter(|_| text.len() <= LONGEST) else {
        return Cow::Borrowed(text);
    };
    if !inner.contains(['"', '\\']) {
        return Cow::Borrowed(inner);
    }
    unescaped(inner).map_or(Cow::Borrowed(text), Cow::Owned)
}

/// `None` where the text has a quote or a backslash that `str::escape_debug` would not have written.
fn unescaped(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(match c {
            '"' => return None,
            '\\' => match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                '0' => '\0',
                c @ ('\\' | '"' | '\'') => c,
                'u' => {
                    let (code, rest) = chars.as_str().strip_prefix('{')?.split_once('}')?;
                    chars = rest.chars();
                    char::from_u32(u32::from_str_radix(code, 16).ok()?)?
                }
                _ => return None,
            },
            c => c,
        });
    }
    Some(out)
}

fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::String(text) => match unquoted(text.as_str()) {
            text if text.eq_ignore_ascii_case("true") => Some(true),
            text if text.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        },
        _ => None,
    }
}

fn is_terminal(value: &Value) -> bool {
    let Value::String(text) = value else {
        return false;
    };
    let status = unquoted(text.as_str());
    TERMINAL.iter().any(|t| status.eq_ignore_ascii_case(t))
}

#[inline]
fn length_bit(name: &str) -> u64 {
    1 << name.len().min(63)
}

struct IdentityVisitor<'a> {
    fields: &'a Fields,
    rank: u16,
    instance_id: Option<Box<str>>,
    run_id: Option<Box<str>>,
    parent_instance_id: Option<Box<str>>,
}

impl IdentityVisitor<'_> {
    fn take(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let slot = match self.fields.meaning(field.name()) {
            Some(Meaning::InstanceId { rank })
                if self.instance_id.is_none() || rank <= self.rank =>
            {
                &mut self.instance_id
            }
            Some(Meaning::RunId) => &mut self.run_id,
            Some(Meaning::ParentInstanceId) => &mut self.parent_instance_id,
            _ => return,
        };
        let mut text = Bounded(String::new());
        if text.write_fmt(value).is_err() {
            return;
        }
        let id = unquoted(&text.0);
        if InvalidInstanceId::check(&id).is_ok() {
            *slot = Some(id.into());
            if let Some(Meaning::InstanceId { rank }) = self.fields.meaning(field.name()) {
                self.rank = rank;
            }
        }
    }
}

/// Prints as the attribute of the span will, so that both are read alike.
impl Visit for IdentityVisitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.take(field, format_args!("{value}"));
    }
}

/// A text that refuses to grow past what an id can be, however much a `Display` writes.
struct Bounded(String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > 6 * MAX_INSTANCE_ID_BYTES + 2 {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

/// Looks which ids are given any value but an empty text.
struct IsThere<'a> {
    fields: &'a Fields,
    found: Ids,
}

impl Visit for IsThere<'_> {
    fn record_debug(&mut self, field: &Field, _: &dyn fmt::Debug) {
        self.found.add(self.fields.meaning(field.name()));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if !value.is_empty() {
            self.found.add(self.fields.meaning(field.name()));
        }
    }
}

/// Looks which ids have a value, printing no more of it than tells whether it is empty.
struct HasValue<'a> {
    fields: &'a Fields,
    found: Ids,
}

impl Visit for HasValue<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let meaning = self.fields.meaning(field.name());
        if let Some(Meaning::InstanceId { .. } | Meaning::RunId) = meaning {
            let mut beginning = Beginning::default();
            // It stops printing as soon as it knows.
            let _ = write!(beginning, "{value:?}");
            if !beginning.is_empty() {
                self.found.add(meaning);
            }
        }
    }
}

/// The first bytes of a text: enough to tell an empty one, in quotes or without.
#[derive(Default)]
struct Beginning {
    bytes: [u8; 3],
    len: usize,
}

impl Beginning {
    fn is_empty(&self) -> bool {
        matches!(&self.bytes[..self.len], b"" | b"\"\"")
    }
}

impl fmt::Write for Beginning {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let free = &mut self.bytes[self.len..];
        let taken = text.len().min(free.len());
        free[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        if taken < text.len() {
            Err(fmt::Error)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_debug_form_of_a_string_is_unquoted() {
        for text in [
            "",
            "a",
            "ü\n\t\"quoted\"\\",
            "\0\u{7f}\u{200b}",
            "'",
            "\u{10ffff}",
        ] {
            assert_eq!(unquoted(&format!("{text:?}")), text);
        }
        for text in [
            "\"",
            "\"a",
            "a\"",
            "\"a\"b\"",
            "\"\\x\"",
            "\"\\\"",
            "\"\\u{110000}\"",
        ] {
            assert_eq!(unquoted(text), text);
        }
    }

    #[test]
    fn of_several_ids_the_first_in_order_with_a_value_counts() {
        let fields = Fields::new(vec!["a".into(), "b".into()]);
        let id =
            |attributes: &[KeyValue]| fields.tag_of(attributes).instance_id.map(Cow::into_owned);
        let (a, b) = (KeyValue::new("a", "1"), KeyValue::new("b", 2));
        assert_eq!(id(&[b.clone(), a.clone()]).as_deref(), Some("1"));
        assert_eq!(id(&[a, b.clone()]).as_deref(), Some("1"));
        assert_eq!(id(&[KeyValue::new("a", ""), b]).as_deref(), Some("2"));
    }
}
