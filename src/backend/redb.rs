//! The backend in one file: a redb database.

mod open;
#[cfg(test)]
mod power_cut;
mod scratch;
mod times;
mod unsynced;

use std::fmt;
use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, Table};

use self::open::{Disk, Identity, RECORDS, close, guarded, identity};
use self::times::Times;
use self::unsynced::{Changes, Unsynced};
use super::codec;
use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::clock::Clock;
use crate::lock::lock;
use crate::stats::Counter;

pub use self::open::OpenError;

/// Number of records that a scan reads in one transaction.
const PAGE: usize = 1024;

/// Number of records that a group of writes checks for expiry: a few, and some more for each write in the group.
const SWEPT: usize = 64;
const SWEPT_PER_WRITE: usize = 4;

/// The longest time that [`RedbSync::Eventual`] keeps a write in memory alone, and the pause after a failed sync.
const EVENTUALLY: Duration = Duration::from_secs(1);

/// A backend in one file, which survives restarts: a [redb] database.
///
/// One process at a time can open the file. A new storage loads all its records, so that spans find their instances in
/// memory; those that do not fit into memory are looked up in the file.
///
/// ```
/// # let directory = std::env::temp_dir().join(format!("redb-doctest-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// # let path = directory.join("contexts.redb");
/// use tracing_workflow_context::{RedbBackend, WorkflowContext, WorkflowContextStorage};
///
/// let open = || -> Result<_, Box<dyn std::error::Error>> {
///     Ok(WorkflowContextStorage::builder().backend(RedbBackend::open(&path)?).build()?)
/// };
/// let storage = open()?;
/// let cx = WorkflowContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "")?;
/// storage.store("order-42", cx.clone())?;
/// storage.flush()?;
/// drop(storage); // The process ends, and another one begins.
///
/// assert_eq!(open()?.get("order-42")?, Some(cx));
/// # std::fs::remove_dir_all(&directory)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # The file
///
/// It is created if it is missing, readable by its owner alone, and not where a symbolic link leads to nothing. Any other
/// file that is not empty, and that this crate has not written, is refused and stays unchanged to the last byte. Each opening checks the whole file, which also repairs it after a crash, and compacts it
/// if it is larger than 4 MiB and less than half of it is in use.
///
/// An expired record is no longer returned. Later writes, each of which checks a few records, free its space for other
/// records in the file. A wall clock that is set forward while the file is open expires nothing. What had expired before the file
/// was opened is counted in [`expired_at_open`](crate::Stats::expired_at_open), and stays in the file for 10 minutes: opened
/// again by then, with a clock that was set right, it is all there. A value that cannot be decoded, such as that of a newer version,
/// is left alone.
///
/// If reading or writing fails, the file is closed, and opened again by the next call. If it is deleted or replaced while
/// it is open, each flush fails until the backend is created anew (on Unix).
///
/// # What can be lost
///
/// | | the process dies | the machine dies |
/// |---|---|---|
/// | flushed writes | nothing | nothing, if fsync is honoured |
/// | other writes, [`RedbSync::Group`] | those still queued in the storage | the same |
/// | other writes, [`RedbSync::TwoPhase`] | those still queued in the storage | the same |
/// | other writes, [`RedbSync::Eventual`] | those of the last second, or since the disk fails | the same |
///
/// No lock is held while code of the caller runs.
///
/// [redb]: https://docs.rs/redb
pub struct RedbBackend {
    shared: Arc<Shared>,
    /// Present with [`RedbSync::Eventual`].
    syncer: Option<Syncer>,
}

/// The moment at which the writes of a [`RedbBackend`] are durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedbSync {
    /// Each group of writes is synced to the disk before the next one begins. Only writes that the storage has still
    /// queued can be lost.
    #[default]
    Group,
    /// All writes are synced once a second, and by each flush. For a disk on which syncing is slow or causes wear: a
    /// crash of the process loses the writes of up to a second, unless they were flushed. Until a sync has succeeded they
    /// stay in memory too, up to 16 MiB, and are written again after a failure, such as that of a full disk.
    Eventual,
    /// As [`Group`](Self::Group), with two syncs for each group, so that damage to what was written last is noticed: then the
    /// file is refused as [`Damaged`](OpenError::Damaged). With one sync redb takes such a group for one that a crash has
    /// interrupted, and opens the file without it. A group of one write took 1.5 to 1.9 times as long, and one of 100 or 1,000 about as
    /// long.
    TwoPhase,
}

impl RedbBackend {
    /// Opens the file, or creates it, with [`RedbSync::Group`].
    ///
    /// # Errors
    ///
    /// If the file was not written by this crate, is damaged or open elsewhere, or if the operating system fails.
    /// Each [`OpenError`] names the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::open_with(path, RedbSync::default())
    }

    /// Opens the file, or creates it.
    ///
    /// # Errors
    ///
    /// The errors of [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, sync: RedbSync) -> Result<Self, OpenError> {
        Self::open_on(Disk::new(path.as_ref()), sync, None)
    }

    /// Opens the file, or creates it, with a clock by which records expire; for tests.
    ///
    /// # Errors
    ///
    /// The errors of [`open`](Self::open).
    pub fn open_with_clock(
        path: impl AsRef<Path>,
        sync: RedbSync,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OpenError> {
        Self::open_on(Disk::new(path.as_ref()), sync, Some(clock))
    }

    fn open_on(
        disk: Disk,
        sync: RedbSync,
        clock: Option<Arc<dyn Clock>>,
    ) -> Result<Self, OpenError> {
        let written_at = disk.path.metadata().and_then(|file| file.modified()).ok();
        let database = disk.open_database()?;
        let shared = Arc::new(Shared {
            file: identity(&disk.path),
            disk,
            sync,
            database: Mutex::new(Some(Arc::new(database))),
            malformed: Counter::default(),
            times: Times::begin(clock, written_at),
            expired_at_open: Counter::default(),
            is_scanned: AtomicBool::new(false),
            swept: Mutex::default(),
            writing: Mutex::default(),
            unsynced: Mutex::default(),
        });
        let syncer = match sync {
            RedbSync::Group | RedbSync::TwoPhase => None,
            RedbSync::Eventual => {
                let syncer = Syncer::start(&shared).map_err(|error| shared.disk.io(error))?;
                Some(syncer)
            }
        };
        Ok(Self { shared, syncer })
    }
}

impl Drop for RedbBackend {
    fn drop(&mut self) {
        if let Some(Syncer { written, thread }) = self.syncer.take() {
            drop(written);
            let _ = thread.join();
        }
    }
}

struct Shared {
    disk: Disk,
    /// The file that was opened first.
    file: Option<Identity>,
    sync: RedbSync,
    /// `None` after a failure, until the file is opened again.
    database: Mutex<Option<Arc<Database>>>,
    malformed: Counter,
    times: Times,
    expired_at_open: Counter,
    /// All records have been read once.
    is_scanned: AtomicBool,
    /// The last key that a sweep has checked.
    swept: Mutex<Vec<u8>>,
    /// Held while a group is written or synced, so that `unsynced` has the order of the transactions. Taken before the other
    /// locks.
    writing: Mutex<()>,
    /// With [`RedbSync::Eventual`]. Taken after the other locks.
    unsynced: Mutex<Unsynced>,
}

/// The thread that syncs once a second, as long as there are writes.
struct Syncer {
    /// Wakes the thread after a write, and ends it when dropped.
    written: SyncSender<()>,
    thread: JoinHandle<()>,
}

impl Syncer {
    fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let (written, wakes) = sync_channel(1);
        let shared = shared.clone();
        let thread = thread::Builder::new().name("workflow-context-sync".into());
        let thread = thread.spawn(move || shared.sync_until_closed(&wakes))?;
        Ok(Self { written, thread })
    }
}

/// The change that a write has made under its key.
enum Change {
    Nothing,
    Removed,
    Value(Vec<u8>),
}

type Records<'txn> = Table<'txn, &'static [u8], &'static [u8]>;

impl Shared {
    /// Runs `run` with the database, which is opened if a failure has closed it, and closed after a failure.
    fn with<R>(
        &self,
        run: impl FnOnce(&Database) -> Result<R, redb::Error>,
    ) -> Result<R, BackendError> {
        let database = self.database()?;
        guarded(|| run(&database)).map_err(|error| {
            self.close_failed(database);
            let message = format!("{}: the database file failed", self.disk.path.display());
            BackendError::new(message, Some(Box::new(error)))
        })
    }

    fn database(&self) -> Result<Arc<Database>, BackendError> {
        let mut database = lock(&self.database);
        if let Some(database) = &*database {
            return Ok(database.clone());
        }
        let refused = |source| {
            let message = "the database file failed before, and cannot be opened again";
            BackendError::new(message, Some(source))
        };
        self.check_file()?;
        let opened = self.disk.open_database();
        let opened = Arc::new(opened.map_err(|error| refused(Box::new(error)))?);
        // What was not synced went with the database that failed, or the last sync did, wholly or in part.
        if let Err(error) = guarded(|| lock(&self.unsynced).redo(&opened)) {
            close([Some(opened)]);
            return Err(refused(Box::new(error)));
        }
        Ok(database.insert(opened).clone())
    }

    /// Fails if the path leads to another file by now, or to none: what was written to the first one is lost with it.
    fn check_file(&self) -> Result<(), BackendError> {
        if self.file.is_some() && identity(&self.disk.path) != self.file {
            let path = self.disk.path.display();
            let message = format!("{path}: the database file was deleted or replaced while open");
            return Err(BackendError::new(message, None));
        }
        Ok(())
    }

    /// Closes a database that has failed, unless another thread has done so already. redb refuses all further work on
    /// it, even if the disk was only full for a while.
    fn close_failed(&self, failed: Arc<Database>) {
        let mut database = lock(&self.database);
        let closed = database.take_if(|database| Arc::ptr_eq(database, &failed));
        drop(database);
        close([Some(failed), closed]);
    }

    fn write(
        &self,
        database: &Database,
        writes: &[Write],
    ) -> Result<Vec<WriteOutcome>, redb::Error> {
        let mut transaction = database.begin_write()?;
        transaction.set_two_phase_commit(self.sync == RedbSync::TwoPhase);
        let is_synced = self.sync != RedbSync::Eventual || lock(&self.unsynced).is_full();
        if !is_synced {
            transaction.set_durability(Durability::None)?;
        }
        let now = self.times.now();
        let mut records = transaction.open_table(RECORDS)?;
        let mut outcomes = Vec::with_capacity(writes.len());
        let mut changes = Changes::new();
        for write in writes {
            let (outcome, change) = self.write_one(&mut records, write, now)?;
            outcomes.push(outcome);
            let value = match change {
                Change::Nothing => continue,
                Change::Removed => None,
                Change::Value(value) => Some(value.into_boxed_slice()),
            };
            if !is_synced {
                changes.push((write.key().as_bytes().into(), value));
            }
        }
        self.sweep(&mut records, SWEPT + SWEPT_PER_WRITE * writes.len(), now)?;
        drop(records);
        transaction.commit()?;
        match is_synced {
            true => lock(&self.unsynced).clear(),
            false => lock(&self.unsynced).add(changes),
        }
        Ok(outcomes)
    }

    /// Carries out a write.
    fn write_one(
        &self,
        records: &mut Records<'_>,
        write: &Write,
        now: SystemTime,
    ) -> Result<(WriteOutcome, Change), redb::Error> {
        let key = write.key().as_bytes();
        let value = match write {
            Write::Put(_, record) => codec::encode(record),
            Write::Remove(_) => {
                records.remove(key)?;
                return Ok((WriteOutcome::Done, Change::Removed));
            }
            Write::Expire(_, at) => match self.live(records, key, now)? {
                Some(record) => codec::encode(&Record {
                    expires_at: *at,
                    ..record
                }),
                None => return Ok((WriteOutcome::Done, Change::Nothing)),
            },
            Write::PutIfAbsent(_, record) => {
                let there = records.get(key)?;
                let there = there.map(|value| self.decode(value.value()));
                match there {
                    Some(None) => return Ok((WriteOutcome::Unreadable, Change::Nothing)),
                    Some(Some(existing)) if existing.expires_at > now => {
                        return Ok((WriteOutcome::Existing(existing), Change::Nothing));
                    }
                    Some(_) | None => codec::encode(record),
                }
            }
        };
        records.insert(key, &*value)?;
        Ok((WriteOutcome::Done, Change::Value(value)))
    }

    /// Reads a record that has not expired.
    fn live(
        &self,
        records: &impl ReadableTable<&'static [u8], &'static [u8]>,
        key: &[u8],
        now: SystemTime,
    ) -> Result<Option<Record>, redb::Error> {
        let value = records.get(key)?;
        let record = value.and_then(|value| self.decode(value.value()));
        Ok(record.filter(|record| record.expires_at > now))
    }

    fn decode(&self, value: &[u8]) -> Option<Record> {
        let record = codec::decode(value);
        if record.is_none() {
            self.malformed.add();
        }
        record
    }

    /// Removes the expired ones among the next `count` records.
    fn sweep(
        &self,
        records: &mut Records<'_>,
        count: usize,
        now: SystemTime,
    ) -> Result<(), redb::Error> {
        let mut swept = lock(&self.swept);
        let (mut expired, mut last) = (Vec::new(), Vec::new());
        for entry in entries_after(records, &swept)?.take(count) {
            let (key, value) = entry?;
            // An undecodable record may be of a newer version, and is kept.
            let expires_at = codec::expires_at(value.value());
            if expires_at.is_some_and(|at| self.times.may_remove(at, now)) {
                expired.push(key.value().to_owned());
            }
            last = key.value().to_owned();
        }
        for key in expired {
            records.remove(&*key)?;
        }
        // Empty after the last record: the next sweep begins with the first.
        *swept = last;
        Ok(())
    }

    /// Fills `page` with the records that follow `after`.
    fn read_page(&self, after: &[u8], page: &mut Page) -> Result<(), BackendError> {
        page.bytes.clear();
        page.ends.clear();
        self.with(|database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            for entry in entries_after(&records, after)?.take(PAGE) {
                let (key, value) = entry?;
                page.bytes.extend_from_slice(key.value());
                let end_of_key = page.bytes.len();
                page.bytes.extend_from_slice(value.value());
                page.ends.push((end_of_key, page.bytes.len()));
            }
            Ok(())
        })
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.check_file()?;
        if self.sync != RedbSync::Eventual {
            return Ok(());
        }
        let _writing = lock(&self.writing);
        if lock(&self.unsynced).is_empty() {
            return Ok(());
        }
        // A database that has failed is opened again, and has all of them then.
        self.with(|database| {
            database.begin_write()?.commit()?;
            lock(&self.unsynced).clear();
            Ok(())
        })
    }

    fn sync_until_closed(&self, wakes: &Receiver<()>) {
        while wakes.recv().is_ok() {
            let deadline = Instant::now() + EVENTUALLY;
            let left = || deadline.saturating_duration_since(Instant::now());
            // More writes end no wait: they are synced together with the first one.
            while wakes.recv_timeout(left()).is_ok() {}
            // There is no caller to tell of a failure: the writes stay unsynced, and the next `flush` meets it too.
            while self.flush().is_err() {
                if let Err(RecvTimeoutError::Disconnected) = wakes.recv_timeout(EVENTUALLY) {
                    return;
                }
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        close([lock(&self.database).take()]);
    }
}

impl StorageBackend for RedbBackend {
    /// Carries out the writes in one transaction: all of them, or none.
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        if writes.is_empty() {
            return Ok(Vec::new());
        }
        let shared = &*self.shared;
        let _writing = lock(&shared.writing);
        let outcomes = shared.with(|database| shared.write(database, writes))?;
        if let Some(syncer) = &self.syncer {
            // A full channel has woken the thread already.
            let _ = syncer.written.try_send(());
        }
        Ok(outcomes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let shared = &*self.shared;
        shared.with(|database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            shared.live(&records, key.as_bytes(), shared.times.now())
        })
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let shared = &*self.shared;
        let (mut page, mut last) = (Page::default(), Vec::new());
        let is_first = !shared.is_scanned.load(Relaxed);
        loop {
            shared.read_page(&last, &mut page)?;
            let now = shared.times.now();
            for (key, value) in page.iter() {
                let Some(record) = shared.decode(value) else {
                    continue;
                };
                match std::str::from_utf8(key) {
                    Ok(key) if record.expires_at > now => visit(key, record),
                    Ok(_) if is_first => shared.expired_at_open.add(),
                    Ok(_) => {}
                    Err(_) => shared.malformed.add(),
                }
            }
            let Some((key, _)) = page.iter().last() else {
                shared.is_scanned.store(true, Relaxed);
                return Ok(());
            };
            last.clear();
            last.extend_from_slice(key);
        }
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.shared.flush()
    }

    fn malformed(&self) -> u64 {
        self.shared.malformed.get()
    }

    fn expired_at_open(&self) -> u64 {
        self.shared.expired_at_open.get()
    }

    fn warms_up(&self) -> bool {
        true
    }
}

impl fmt::Debug for RedbBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbBackend")
            .field("path", &self.shared.disk.path)
            .field("sync", &self.shared.sync)
            .finish_non_exhaustive()
    }
}

type Entry<'a> = (
    redb::AccessGuard<'a, &'static [u8]>,
    redb::AccessGuard<'a, &'static [u8]>,
);

/// Iterates over the entries that follow a key, in order.
fn entries_after<'a>(
    records: &'a impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &[u8],
) -> Result<impl Iterator<Item = Result<Entry<'a>, redb::StorageError>>, redb::Error> {
    Ok(records.range::<&[u8]>((Bound::Excluded(key), Bound::Unbounded))?)
}

/// Keys and encoded records, as they are in the file.
#[derive(Default)]
struct Page {
    bytes: Vec<u8>,
    /// The offsets at which each key and its record end.
    ends: Vec<(usize, usize)>,
}

impl Page {
    fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|(_, end)| *end));
        let between = |(start, (key, end)): (usize, &(usize, usize))| {
            (&self.bytes[start..*key], &self.bytes[*key..*end])
        };
        starts.zip(&self.ends).map(between)
    }
}
