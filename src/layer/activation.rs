//! Context activation: whether the inner layer starts a span when it is entered.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use opentelemetry::Context as OtelContext;
use opentelemetry::trace::TraceContextExt as _;

/// The inner layer's setting of context activation. It has no getter, so the setting is observed on the first span for
/// which it makes a difference.
#[derive(Debug, Default)]
pub(super) struct Activation(AtomicU8);

impl Activation {
    const UNKNOWN: u8 = 0;
    const ON: u8 = 1;
    const OFF: u8 = 2;

    pub(super) fn is_on(&self) -> bool {
        self.0.load(Relaxed) == Self::ON
    }

    pub(super) fn is_off(&self) -> bool {
        self.0.load(Relaxed) == Self::OFF
    }

    /// Enters a span by `enter`, and observes its effect on the current OpenTelemetry context. Returns `true` if the span
    /// became the current one.
    pub(super) fn observe(&self, enter: impl FnOnce()) -> bool {
        if self.0.load(Relaxed) != Self::UNKNOWN {
            enter();
            return self.is_on();
        }
        // On top of a context without a span, a current span can only come from the inner layer.
        let blank = OtelContext::new().attach();
        enter();
        let became_current = OtelContext::map_current(|cx| cx.has_active_span());
        drop(blank);
        self.0
            .store(if became_current { Self::ON } else { Self::OFF }, Relaxed);
        became_current
    }
}
