//! The file beneath the database.

use std::io;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{BackendError, StorageBackend};

/// What a file begins with while it is being created.
const UNFINISHED: &[u8] = b"workflow contexts, being created";

/// Where redb keeps its header, which makes the rest valid.
const FIRST_PAGE: u64 = 4096;

/// A file whose changes are held back in memory until it is known to be ours.
///
/// So somebody else's file stays as it is to the last byte, even if redb would have repaired it. And a new one
/// comes into being as a whole: whenever that is interrupted, the next one who opens the file begins anew.
#[derive(Clone, Debug)]
pub(super) struct HeldBack(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    disk: Box<dyn StorageBackend>,
    let_go: AtomicBool,
    /// `None` before the file is looked at, for which it must be locked.
    held: Mutex<Option<Held>>,
}

#[derive(Debug)]
struct Held {
    /// There was nothing in the file, or what somebody did not finish.
    is_new: bool,
    /// How much of the file on the disk is looked at.
    base: u64,
    len: u64,
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    SetLen(u64),
    Write(u64, Box<[u8]>),
    Sync,
}

impl HeldBack {
    pub(super) fn new(disk: Box<dyn StorageBackend>) -> Self {
        Self(Arc::new(Shared {
            disk,
            let_go: AtomicBool::new(false),
            held: Mutex::new(None),
        }))
    }

    /// Whether the file was empty, or is as good as that.
    pub(super) fn is_new(&self) -> io::Result<bool> {
        self.held(|held| Ok(held.is_new))
    }

    /// Carries out what was held back, and holds back nothing from now on. Nobody may use the file meanwhile.
    pub(super) fn let_go(&self) -> io::Result<()> {
        let disk = &*self.0.disk;
        self.held(|held| {
            if held.is_new {
                return held.create(disk);
            }
            held.changes.drain(..).try_for_each(|change| match change {
                Change::SetLen(len) => disk.set_len(len),
                Change::Write(at, bytes) => disk.write(at, &bytes),
                Change::Sync => disk.sync_data(),
            })
        })?;
        self.0.let_go.store(true, Ordering::Release);
        Ok(())
    }

    /// Answers for as long as changes are held back; `direct` afterwards.
    fn route<R>(
        &self,
        direct: impl FnOnce(&dyn StorageBackend) -> io::Result<R>,
        held: impl FnOnce(&mut Held, &dyn StorageBackend) -> io::Result<R>,
    ) -> io::Result<R> {
        let disk = &*self.0.disk;
        match self.0.let_go.load(Ordering::Acquire) {
            true => direct(disk),
            false => self.held(|state| held(state, disk)),
        }
    }

    fn held<R>(&self, run: impl FnOnce(&mut Held) -> io::Result<R>) -> io::Result<R> {
        let mut held: MutexGuard<'_, Option<Held>> =
            self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = match &mut *held {
            Some(held) => held,
            unknown => unknown.insert(Held::of(&*self.0.disk)?),
        };
        run(held)
    }
}

impl Held {
    fn of(disk: &dyn StorageBackend) -> io::Result<Self> {
        let len = disk.len()?;
        let is_new = is_unfinished(disk, len)?;
        let base = if is_new { 0 } else { len };
        Ok(Self {
            is_new,
            base,
            len: base,
            changes: Vec::new(),
        })
    }

    fn read(&self, disk: &dyn StorageBackend, at: u64, out: &mut [u8]) -> io::Result<()> {
        let end = at.saturating_add(out.len() as u64);
        if end > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (on_disk, beyond) = out.split_at_mut(self.base.clamp(at, end).abs_diff(at) as usize);
        disk.read(at, on_disk)?;
        beyond.fill(0);
        for change in &self.changes {
            match change {
                // Whatever was beyond is gone for good: it is zero where the file grows again.
                Change::SetLen(len) => {
                    let kept = len.clamp(&at, &end).abs_diff(at) as usize;
                    out[kept..].fill(0);
                }
                Change::Write(from, bytes) => {
                    let to = from + bytes.len() as u64;
                    let (start, stop) = (at.max(*from), end.min(to));
                    if start < stop {
                        let bytes = &bytes[(start - from) as usize..(stop - from) as usize];
                        out[(start - at) as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                }
                Change::Sync => {}
            }
        }
        Ok(())
    }

    /// Writes a new file so that it is recognised as an unfinished one until it is complete.
    fn create(&mut self, disk: &dyn StorageBackend) -> io::Result<()> {
        let mut image = vec![0; usize::try_from(self.len).map_err(io::Error::other)?];
        self.read(disk, 0, &mut image)?;
        let (first, rest) = image.split_at(image.len().min(FIRST_PAGE as usize));
        if disk.len()? != 0 {
            disk.set_len(0)?;
        }
        disk.write(0, UNFINISHED)?;
        disk.sync_data()?;
        disk.set_len(self.len)?;
        disk.write(FIRST_PAGE, rest)?;
        disk.sync_data()?;
        disk.write(0, first)?;
        disk.sync_data()
    }
}

/// Whether the file is empty, or what is left of one whose creation was interrupted.
fn is_unfinished(disk: &dyn StorageBackend, len: u64) -> io::Result<bool> {
    let mut begin = vec![
        0;
        UNFINISHED
            .len()
            .min(usize::try_from(len).unwrap_or(usize::MAX))
    ];
    disk.read(0, &mut begin)?;
    // A power cut can keep the length of what was written first, and lose some of it.
    let torn = len <= UNFINISHED.len() as u64
        && begin
            .iter()
            .zip(UNFINISHED)
            .all(|(byte, expected)| [0, *expected].contains(byte));
    Ok(torn || begin == UNFINISHED)
}

impl StorageBackend for HeldBack {
    fn len(&self) -> io::Result<u64> {
        self.route(|disk| disk.len(), |held, _| Ok(held.len))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self.0.let_go.load(Ordering::Acquire) {
            true => self.0.disk.read(offset, out),
            false => self.held(|held| held.read(&*self.0.disk, offset, out)),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.route(
            |disk| disk.set_len(len),
            |held, _| {
                held.len = len;
                held.changes.push(Change::SetLen(len));
                Ok(())
            },
        )
    }

    fn sync_data(&self) -> io::Result<()> {
        self.route(
            |disk| disk.sync_data(),
            |held, _| {
                held.changes.push(Change::Sync);
                Ok(())
            },
        )
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.route(
            |disk| disk.write(offset, data),
            |held, _| {
                held.len = held.len.max(offset + data.len() as u64);
                held.changes.push(Change::Write(offset, data.into()));
                Ok(())
            },
        )
    }

    fn close(&self) -> io::Result<()> {
        self.0.disk.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.disk.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.0.disk.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.disk.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.disk.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.disk.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.disk.query_lock_range(start, end)
    }
}
