//! The authors of records: the spans that recorded contexts, interned.

use std::borrow::Cow;
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
    /// Reads the author from a span that is about to start.
    pub(crate) fn from_span(span: &SpanBuilder) -> Self {
        let target = target_of(span).map(Cow::into_owned).unwrap_or_default();
        Self {
            span_name: span.name.clone(),
            target: target.into(),
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

    /// Returns the number of an author; `None` if it is one too many.
    pub(crate) fn number(&self, author: Author) -> Option<NonZeroU16> {
        if let Some(known) = self.numbers.get(&author) {
            return Some(*known);
        }
        let next = |last| (last < Self::MAX).then_some(last + 1);
        let last = self.last.fetch_update(Relaxed, Relaxed, next).ok()?;
        let new = NonZeroU16::MIN.saturating_add(last);
        // If another thread inserted the same author meanwhile, this number stays unused.
        Some(*self.numbers.entry(author).or_insert(new))
    }

    /// Returns the author with that number.
    pub(crate) fn get(&self, number: NonZeroU16) -> Option<Author> {
        let found = self.numbers.iter().find(|known| *known.value() == number);
        found.map(|known| known.key().clone())
    }
}
