//! The authors of records: the spans that recorded contexts, interned.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use dashmap::DashMap;
use opentelemetry::trace::SpanBuilder;

use crate::fields::target_of;

/// The name and target of a span that recorded a context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Author {
    pub(crate) span_name: Cow<'static, str>,
    /// Empty if the span has no attribute `target`.
    pub(crate) target: Cow<'static, str>,
}

impl Author {
    pub(crate) fn is_known(&self) -> bool {
        !self.span_name.is_empty()
    }

    /// Reads the author from a span that is about to start.
    pub(crate) fn from_span(span: &SpanBuilder) -> Self {
        let target = target_of(span).map(Cow::into_owned).unwrap_or_default();
        Self {
            span_name: span.name.clone(),
            target: target.into(),
        }
    }
}

/// The writer of a record.
#[derive(Clone, Debug)]
pub(crate) enum Writer {
    Call,
    Span(Author),
    /// A span whose name is one too many to be kept, or was forgotten before it recorded.
    UnnamedSpan,
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call => f.write_str("by a call"),
            Self::Span(by) if by.target.is_empty() => write!(f, "by span {:?}", by.span_name),
            Self::Span(by) => {
                let target = by.target.escape_debug();
                write!(f, "by span {:?} of {target}", by.span_name)
            }
            Self::UnnamedSpan => f.write_str("by a span whose name is not kept"),
        }
    }
}

/// The authors of a storage, each kept once: the entries of the cache hold its number.
#[derive(Debug, Default)]
pub(crate) struct Authors {
    numbers: DashMap<Author, NonZeroU16, foldhash::fast::RandomState>,
    last: AtomicU16,
}

impl Authors {
    /// The maximum number of authors, since span names made at run time have no bound. Further ones are not kept.
    const MAX: u16 = 1024;

    /// The number of all authors that are not kept.
    const UNNAMED: NonZeroU16 = NonZeroU16::MAX;

    /// Returns the number of an author.
    pub(crate) fn number(&self, author: Author) -> NonZeroU16 {
        if !author.is_known() {
            return Self::UNNAMED;
        }
        if let Some(known) = self.numbers.get(&author) {
            return *known;
        }
        let next = |last| (last < Self::MAX).then_some(last + 1);
        let Ok(last) = self.last.fetch_update(Relaxed, Relaxed, next) else {
            return Self::UNNAMED;
        };
        let new = NonZeroU16::MIN.saturating_add(last);
        // If another thread inserted the same author meanwhile, this number stays unused.
        *self.numbers.entry(author).or_insert(new)
    }

    /// Returns the writer of a record with the number of its author, if that is a span.
    pub(crate) fn writer(&self, author: Option<NonZeroU16>) -> Writer {
        let Some(number) = author else {
            return Writer::Call;
        };
        let found = self.numbers.iter().find(|known| *known.value() == number);
        found.map_or(Writer::UnnamedSpan, |known| {
            Writer::Span(known.key().clone())
        })
    }
}
