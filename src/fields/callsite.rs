//! The cache of callsites: the role that the spans of each have for this crate.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tracing::Metadata;

use super::meaning::ReservedFields;

/// The role of a span, known before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// No role in this crate.
    Ordinary,
    /// Declares a reserved field.
    Tagged,
    /// A span in which a process waits for work.
    Poller,
    /// An engine's own span around user code, which waits for the instance of its first child.
    Engine,
}

/// The properties that all spans of one callsite share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Callsite {
    pub(crate) role: Role,
    pub(crate) declares: ReservedFields,
}

/// A lossy cache of callsites: each in the slot to which its address hashes. One whose slot is taken is read each time.
#[derive(Debug)]
pub(crate) struct Callsites {
    /// The address and, below it, a [`Callsite`] in eight bits: no machine has addresses of more than 56 for programs.
    slots: Box<[AtomicU64; Self::SLOTS]>,
}

impl Callsites {
    const SLOTS: usize = 1024;

    pub(crate) fn new() -> Self {
        Self {
            slots: Box::new([const { AtomicU64::new(0) }; Self::SLOTS]),
        }
    }

    /// Returns the callsite of a span, which `read` reads if it is not known.
    #[inline]
    pub(crate) fn get(
        &self,
        metadata: &'static Metadata<'static>,
        read: impl FnOnce(&Metadata<'_>) -> Callsite,
    ) -> Callsite {
        let address = (std::ptr::from_ref(metadata).addr() as u64) << Callsite::BITS;
        let hash = address.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let slot = &self.slots[(hash >> 54) as usize % Self::SLOTS];
        match slot.load(Relaxed) ^ address {
            bits if bits < 1 << Callsite::BITS => Callsite::from_bits(bits),
            _ => Self::add(slot, address, read(metadata)),
        }
    }

    #[cold]
    fn add(slot: &AtomicU64, address: u64, callsite: Callsite) -> Callsite {
        let known = address | callsite.to_bits();
        // The loser of a race for the slot is read again.
        let _ = slot.compare_exchange(0, known, Relaxed, Relaxed);
        callsite
    }
}

impl Callsite {
    /// The bits in which one is kept: two for the role.
    const BITS: u32 = 2 + ReservedFields::BITS;

    #[inline]
    fn from_bits(bits: u64) -> Self {
        Self {
            role: match bits & 3 {
                0 => Role::Ordinary,
                1 => Role::Tagged,
                2 => Role::Poller,
                _ => Role::Engine,
            },
            declares: ReservedFields::from_bits((bits >> 2) as u8),
        }
    }

    fn to_bits(self) -> u64 {
        self.role as u64 | u64::from(self.declares.bits()) << 2
    }
}
