//! A view of a file whose changes stay in memory, to look into a database without changing the file.

use std::io;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;

use crate::lock::lock;

/// A file with changes on top, which are dropped with the last clone. Clones are the same file.
///
/// redb reads a database that was not closed properly only after a repair; here it repairs the view.
///
/// It takes no locks: its owner has to lock the file below, and to close it.
#[derive(Clone, Debug)]
pub(super) struct Scratch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// `None` for a file that is empty at first.
    below: Option<Arc<dyn StorageBackend>>,
    changes: Mutex<Changes>,
}

#[derive(Debug)]
struct Changes {
    /// Length of the file below.
    base: u64,
    len: u64,
    log: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    SetLen(u64),
    Write(u64, Box<[u8]>),
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self::with_base(None, 0)
    }

    pub(super) fn from_file(below: Arc<dyn StorageBackend>) -> io::Result<Self> {
        let len = below.len()?;
        Ok(Self::with_base(Some(below), len))
    }

    fn with_base(below: Option<Arc<dyn StorageBackend>>, base: u64) -> Self {
        let changes = Changes {
            base,
            len: base,
            log: Vec::new(),
        };
        Self(Arc::new(Shared {
            below,
            changes: Mutex::new(changes),
        }))
    }

    pub(super) fn contents(&self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.len()?).map_err(io::Error::other)?;
        let mut contents = vec![0; len];
        self.read(0, &mut contents)?;
        Ok(contents)
    }
}

impl StorageBackend for Scratch {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0.changes).len)
    }

    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let changes = lock(&self.0.changes);
        let end = at.saturating_add(out.len() as u64);
        if end > changes.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        out.fill(0);
        if let Some(below) = &self.0.below {
            let in_base = changes.base.clamp(at, end) - at;
            below.read(at, &mut out[..in_base as usize])?;
        }
        for change in &changes.log {
            match change {
                // Bytes beyond the end are gone for good: they are zero if the file grows again.
                Change::SetLen(len) => {
                    let kept = len.clamp(&at, &end) - at;
                    out[kept as usize..].fill(0);
                }
                Change::Write(from, bytes) => {
                    let to = from + bytes.len() as u64;
                    let (start, stop) = (at.max(*from), end.min(to));
                    if start < stop {
                        let bytes = &bytes[(start - from) as usize..(stop - from) as usize];
                        out[(start - at) as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                }
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut changes = lock(&self.0.changes);
        changes.len = len;
        changes.log.push(Change::SetLen(len));
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let mut changes = lock(&self.0.changes);
        changes.len = changes.len.max(at + data.len() as u64);
        changes.log.push(Change::Write(at, data.into()));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}
