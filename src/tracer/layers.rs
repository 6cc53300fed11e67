//! The layers of one storage, so that its tracers reach the spans that they hold.

use std::sync::Mutex;

use tracing::Dispatch;
use tracing::dispatcher::WeakDispatch;

use crate::lock::lock;

/// The dispatch of each living layer whose subscriber is known, by the layer's number.
#[derive(Debug, Default)]
pub(crate) struct Layers(Mutex<Vec<(usize, WeakDispatch)>>);

impl Layers {
    pub(crate) fn add(&self, layer: usize, dispatch: WeakDispatch) {
        // Dropped after the lock: one may be the last handle of a subscriber.
        let mut alive = Vec::new();
        let mut layers = lock(&self.0);
        layers.retain(|(_, dispatch)| {
            alive.push(dispatch.upgrade());
            matches!(alive.last(), Some(Some(_)))
        });
        layers.push((layer, dispatch));
        drop(layers);
    }

    pub(super) fn dispatch_of(&self, layer: usize) -> Option<Dispatch> {
        let found = (lock(&self.0).iter()).find_map(|(known, dispatch)| {
            let is_it = *known == layer;
            is_it.then(|| dispatch.clone())
        });
        found?.upgrade()
    }
}
