//! The visitors that read ids from the fields of spans and records.

use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};

use super::identity::Ids;
use super::meaning::{Meaning, Meanings, Owner, ReservedFields};
use super::value::{LONGEST_TEXT, plain};
use crate::error::InvalidInstanceId;

/// Reads the ids; that of an instance has still to get its form.
pub(super) struct IdentityVisitor<'a> {
    pub(super) meanings: &'a Meanings,
    pub(super) owner: Owner<'a>,
    pub(super) ids: Ids,
}

impl IdentityVisitor<'_> {
    fn take(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let ids = &mut self.ids;
        let meaning = self.meanings.get(field.name(), self.owner);
        let slot = match meaning {
            Some(Meaning::InstanceId { rank }) if ids.instance_id.is_none() || rank <= ids.rank => {
                &mut ids.instance_id
            }
            Some(Meaning::RunId) => &mut ids.run_id,
            Some(Meaning::ParentInstanceId) => &mut ids.parent_instance_id,
            Some(Meaning::Observing) => {
                let text = read(value);
                ids.observing = text.is_some_and(|text| text.eq_ignore_ascii_case("true"));
                return;
            }
            _ => return,
        };
        let id = read(value).filter(|id| InvalidInstanceId::check(id).is_ok());
        if let Some(id) = id {
            *slot = Some(id.into());
            if let Some(Meaning::InstanceId { rank }) = meaning {
                ids.rank = rank;
            }
        }
    }
}

/// Formats as the attribute of the span is formatted, so that both give the same id.
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

/// Reads the field that names the queue of a job.
pub(super) struct QueueVisitor {
    pub(super) name: &'static str,
    pub(super) queue: Option<String>,
}

impl Visit for QueueVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == self.name {
            self.queue = read(format_args!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == self.name {
            self.queue = read(format_args!("{value}"));
        }
    }
}

/// Reads a value as ids are read; `None` if it is too long to be one.
fn read(value: fmt::Arguments<'_>) -> Option<String> {
    let mut text = Bounded(String::new());
    text.write_fmt(value).ok()?;
    Some(plain(&text.0).into_owned())
}

/// A text that refuses to grow past the longest id, however much a `Display` writes.
struct Bounded(String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > LONGEST_TEXT {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

/// Finds the id fields that have any value but an empty text.
pub(super) struct IsThere<'a> {
    pub(super) meanings: &'a Meanings,
    pub(super) owner: Owner<'a>,
    pub(super) found: ReservedFields,
}

impl IsThere<'_> {
    #[inline]
    fn add(&mut self, field: &Field) {
        let meaning = self.meanings.get(field.name(), self.owner);
        self.found = self.found.with(ReservedFields::from_meaning(meaning));
    }
}

impl Visit for IsThere<'_> {
    fn record_debug(&mut self, field: &Field, _: &dyn fmt::Debug) {
        self.add(field);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if !value.is_empty() {
            self.add(field);
        }
    }
}

/// Finds whether the field with that index has any value but an empty text.
pub(super) struct IsThereAt {
    pub(super) index: usize,
    pub(super) is_there: bool,
}

impl Visit for IsThereAt {
    fn record_debug(&mut self, field: &Field, _: &dyn fmt::Debug) {
        self.is_there |= field.index() == self.index;
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.is_there |= field.index() == self.index && !value.is_empty();
    }
}

/// Finds the id fields that have a value, formatting no more of it than shows whether it is empty.
pub(super) struct HasValue<'a> {
    pub(super) meanings: &'a Meanings,
    pub(super) owner: Owner<'a>,
    pub(super) found: ReservedFields,
}

impl Visit for HasValue<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let meaning = self.meanings.get(field.name(), self.owner);
        let field = ReservedFields::from_meaning(meaning).to_wait_for();
        if field != ReservedFields::NONE {
            let mut beginning = Beginning::default();
            // Fails, and so stops formatting, as soon as that is known.
            let _ = write!(beginning, "{value:?}");
            if !beginning.is_empty() {
                self.found = self.found.with(field);
            }
        }
    }
}

/// The first bytes of a text: enough to tell one that is no id, such as `""`, `None` and `Some("")`.
#[derive(Default)]
struct Beginning {
    bytes: [u8; 16],
    len: usize,
}

impl Beginning {
    fn is_empty(&self) -> bool {
        match self.bytes[..self.len] {
            [] => true,
            [b'"' | b'N' | b'S', ..] if self.len < self.bytes.len() => {
                let text = std::str::from_utf8(&self.bytes[..self.len]);
                text.is_ok_and(|text| plain(text).is_empty())
            }
            _ => false,
        }
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
