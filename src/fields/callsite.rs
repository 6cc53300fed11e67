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

/// The properties that all spans of one callsite share, in eleven bits: two for the role, six for the reserved fields that
/// are declared, three for the index of the sole id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Callsite(u16);

/// A lossy cache of callsites: each in the slot to which its address hashes. One whose slot is taken is read each time.
#[derive(Debug)]
pub(crate) struct Callsites {
    /// The address, whose three lowest bits are zero, and below it a [`Callsite`] in eleven bits: no machine has addresses of
    /// more than 56 bits for programs.
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
        const { assert!(align_of::<Metadata<'_>>() >= 1 << Callsite::BITS_OF_ADDRESS) }
        let address = std::ptr::from_ref(metadata).addr() as u64;
        let address = address << (Callsite::BITS - Callsite::BITS_OF_ADDRESS);
        let hash = address.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let slot = &self.slots[(hash >> 54) as usize % Self::SLOTS];
        match slot.load(Relaxed) ^ address {
            bits if bits < 1 << Callsite::BITS => Callsite(bits as u16),
            _ => Self::add(slot, address, read(metadata)),
        }
    }

    #[cold]
    fn add(slot: &AtomicU64, address: u64, callsite: Callsite) -> Callsite {
        let known = address | u64::from(callsite.0);
        // The loser of a race for the slot is read again.
        let _ = slot.compare_exchange(0, known, Relaxed, Relaxed);
        callsite
    }
}

impl Callsite {
    const BITS: u32 = 2 + ReservedFields::BITS + 3;
    /// Those of them that are free in any address.
    const BITS_OF_ADDRESS: u32 = 3;

    const INDEX_SHIFT: u32 = 2 + ReservedFields::BITS;
    /// Stands for an index that is not known.
    const NO_INDEX: u16 = 7;

    /// `sole_id` is the index of the instance id among the fields, if that is the only reserved one.
    pub(super) fn new(role: Role, declares: ReservedFields, sole_id: Option<usize>) -> Self {
        let index = (sole_id.and_then(|index| u16::try_from(index).ok()))
            .filter(|index| *index < Self::NO_INDEX)
            .unwrap_or(Self::NO_INDEX);
        Self(role as u16 | u16::from(declares.bits()) << 2 | index << Self::INDEX_SHIFT)
    }

    #[inline]
    pub(crate) fn role(self) -> Role {
        match self.0 & 3 {
            0 => Role::Ordinary,
            1 => Role::Tagged,
            2 => Role::Poller,
            _ => Role::Engine,
        }
    }

    #[inline]
    pub(crate) fn declares(self) -> ReservedFields {
        ReservedFields::from_bits((self.0 >> 2) as u8 & ((1 << ReservedFields::BITS) - 1))
    }

    /// Returns the index of the instance id among the fields, if that is the only reserved one, and one of the first seven
    /// fields: it is found there without comparing names.
    #[inline]
    pub(super) fn sole_id(self) -> Option<usize> {
        let index = self.0 >> Self::INDEX_SHIFT;
        (index != Self::NO_INDEX).then_some(usize::from(index))
    }
}
