//! A filter for logging layers, which hides what replayed code tells once more.

use std::sync::Arc;

use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter};
use tracing_subscriber::registry::LookupSpan;

use crate::storage::shared::Shared;
use crate::tracer::replay::Numbered;

/// Hides the events of replayed spans.
pub(crate) struct LogFilter {
    shared: Arc<Shared>,
}

impl LogFilter {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl<S> Filter<S> for LogFilter
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, ctx: &Context<'_, S>) -> bool {
        let replays = &self.shared.replays;
        if replays.is_idle() {
            return true;
        }
        let spans = ctx.event_scope(event).into_iter().flatten();
        // Of another storage, it says nothing of this one's replays.
        let number = |numbered: &Numbered| numbered.is_of(&self.shared).then_some(numbered.number);
        let mut numbers = spans.filter_map(|span| number(span.extensions().get::<Numbered>()?));
        numbers
            .next()
            .is_none_or(|innermost| !replays.is_replayed(innermost))
    }
}
