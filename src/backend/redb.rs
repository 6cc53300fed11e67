//! A backend in a file of this machine.

mod file;
#[cfg(test)]
mod power_cut;

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use redb::backends::FileBackend;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table,
    TableDefinition, TableError,
};

use super::codec;
use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::lock::lock;
use crate::stats::Counter;
use file::HeldBack;

/// Some keys and their records, as they are in the file.
#[derive(Default)]
struct Page {
    bytes: Vec<u8>,
    /// Where each key ends, and its record.
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

/// Has the version of the format under [`FORMAT`], and by its name tells our files from all others.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("tracing-workflow-context");
const FORMAT: &str = "format";
const FORMAT_VERSION: u64 = 1;

/// Keys, which are text, and records as [`codec`] writes them.
const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

/// What redb may keep in memory of the file. Its own default is 1 GiB.
const CACHE: usize = 32 * 1024 * 1024;

/// A file of at least this many bytes is made smaller when it is opened and less than half of it is in use.
const WORTH_COMPACTING: u64 = 4 * 1024 * 1024;

/// How many records a scan reads at a time.
const PAGE: usize = 1024;

/// How many records a write looks at for those that are over, and for how many more with each change in it.
const SWEPT: usize = 64;
const SWEPT_PER_CHANGE: usize = 4;

/// The longest time that [`RedbSync::Eventual`] keeps a write in memory alone.
const EVENTUALLY: Duration = Duration::from_secs(1);

/// A backend in one file of this machine, which survives restarts: a [redb] database.
///
/// One process at a time has the file open. A new storage loads what is in it, so that spans find their instances in
/// memory; what memory has no room for is looked up in the file.
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
/// It is created where there is none, or an empty one. Any other file that this crate has not written is refused,
/// and left as it is to the last byte. Each opening checks the whole file, which also brings it in order after a
/// crash, and makes it smaller where it is larger than 4 MiB and less than half of it is in use.
///
/// A record that is over is no longer shown; its space is freed by later writes, each of which looks at a few
/// records. Within the file that space is used again.
///
/// Where reading or writing fails, the file is closed, and opened again by the next call.
///
/// # What can be lost
///
/// | | the process dies | the machine dies |
/// |---|---|---|
/// | what was flushed | nothing | nothing, where the disk keeps its word |
/// | other writes, [`RedbSync::Group`] | what the storage has still queued | the same |
/// | other writes, [`RedbSync::Eventual`] | those of the last second | the same |
///
/// No lock is held while code of the caller runs.
///
/// [redb]: https://docs.rs/redb
pub struct RedbBackend {
    shared: Arc<Shared>,
    /// With [`RedbSync::Eventual`].
    syncing: Option<JoinHandle<()>>,
}

/// When a [`RedbBackend`] waits for the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedbSync {
    /// Each group of writes is on the disk before the next one begins. At any moment only what the storage has still
    /// queued can be lost.
    #[default]
    Group,
    /// Within a second, or when something is flushed. For a disk on which waiting costs much, or wears it out: a
    /// crash of the process loses the writes of up to that second, unless they were flushed.
    Eventual,
}

/// Why a [`RedbBackend`] could not be opened. The file is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has the file open, or another backend of this one.
    #[error("{}: the file is open already, in this process or in another one", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file is something else: another program's database, no database at all, or not even a file.
    #[error("{}: this is no file of workflow contexts, and is left alone", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// A newer version of this crate has written the file.
    #[error(
        "{}: the file has format {found}, and this version of the crate knows formats up to {FORMAT_VERSION}",
        path.display()
    )]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// The version of its format.
        found: u64,
    },
    /// The file was truncated, or changed by something else. What is in it cannot be trusted; without the file,
    /// instances that are under way begin new traces.
    #[error("{}: the file is damaged; remove it to begin anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What redb has found.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The operating system refused something.
    #[error("{}: the file cannot be opened", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

impl RedbBackend {
    /// Opens the file, or creates it, with [`RedbSync::Group`].
    ///
    /// # Errors
    ///
    /// [`OpenError`], which names the file, for anything but a sound file of ours that nobody else has open.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::open_with(path, RedbSync::default())
    }

    /// Opens the file, or creates it.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, sync: RedbSync) -> Result<Self, OpenError> {
        let path = path.as_ref().to_owned();
        let open_file = Box::new(open_file);
        Self::open_on(Disk { path, open_file }, sync)
    }

    fn open_on(disk: Disk, sync: RedbSync) -> Result<Self, OpenError> {
        let database = disk.open_database()?;
        let shared = Arc::new(Shared {
            disk,
            sync,
            database: Mutex::new(Some(Arc::new(database))),
            malformed: Counter::default(),
            swept: Mutex::default(),
            pending: Mutex::default(),
            wake: Condvar::new(),
        });
        let syncing = match sync {
            RedbSync::Group => None,
            RedbSync::Eventual => {
                let shared = shared.clone();
                let thread = thread::Builder::new().name("workflow-context-sync".into());
                Some(thread.spawn(move || shared.sync_until_closed()))
            }
        };
        let syncing = syncing.transpose().map_err(|error| shared.disk.io(error))?;
        Ok(Self { shared, syncing })
    }
}

impl Drop for RedbBackend {
    fn drop(&mut self) {
        self.shared.pending().closing = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.syncing.take() {
            let _ = thread.join();
        }
    }
}

struct Shared {
    disk: Disk,
    sync: RedbSync,
    /// `None` after a failure, until the file is opened again.
    database: Mutex<Option<Arc<Database>>>,
    malformed: Counter,
    /// The key up to which a sweep has come.
    swept: Mutex<Vec<u8>>,
    pending: Mutex<Pending>,
    wake: Condvar,
}

/// What is not on the disk yet, with [`RedbSync::Eventual`].
#[derive(Debug, Default)]
struct Pending {
    writes: bool,
    /// Some of it never came there.
    lost: bool,
    closing: bool,
}

type Records<'txn> = Table<'txn, &'static [u8], &'static [u8]>;

impl Shared {
    /// Runs with the database, opened again if need be. After a failure it is closed.
    fn with<R>(
        &self,
        run: impl FnOnce(&Database) -> Result<R, redb::Error>,
    ) -> Result<R, BackendError> {
        let database = self.database()?;
        guarded(|| run(&database)).map_err(|error| {
            self.give_up(database);
            let message = format!("{}: the file has failed", self.disk.path.display());
            BackendError::new(message, Some(Box::new(error)))
        })
    }

    fn database(&self) -> Result<Arc<Database>, BackendError> {
        let mut database = lock(&self.database);
        if let Some(database) = &*database {
            return Ok(database.clone());
        }
        let opened = self.disk.open_database().map_err(|error| {
            let message = "the file had failed, and could not be opened again";
            BackendError::new(message, Some(Box::new(error)))
        })?;
        Ok(database.insert(Arc::new(opened)).clone())
    }

    /// Closes the database, unless another thread has done so and it was opened again. redb does nothing more with
    /// a file that has failed once, were it only that the disk was full for a while.
    fn give_up(&self, failed: Arc<Database>) {
        let mut database = lock(&self.database);
        let closed = database.take_if(|database| Arc::ptr_eq(database, &failed));
        drop(database);
        if closed.is_some() {
            let mut pending = self.pending();
            pending.lost |= std::mem::take(&mut pending.writes);
        }
        close([Some(failed), closed]);
    }

    fn write(
        &self,
        database: &Database,
        writes: &[Write],
    ) -> Result<Vec<Option<Record>>, redb::Error> {
        let mut transaction = database.begin_write()?;
        if self.sync == RedbSync::Eventual {
            transaction.set_durability(Durability::None)?;
        }
        let now = SystemTime::now();
        let mut records = transaction.open_table(RECORDS)?;
        let winners = writes
            .iter()
            .map(|write| self.write_one(&mut records, write, now))
            .collect::<Result<_, _>>()?;
        self.sweep(&mut records, SWEPT + SWEPT_PER_CHANGE * writes.len(), now)?;
        drop(records);
        transaction.commit()?;
        Ok(winners)
    }

    fn write_one(
        &self,
        records: &mut Records<'_>,
        write: &Write,
        now: SystemTime,
    ) -> Result<Option<Record>, redb::Error> {
        let key = write.key().as_bytes();
        match write {
            Write::Put(_, record) => drop(records.insert(key, &*codec::encode(record))?),
            Write::Remove(_) => drop(records.remove(key)?),
            Write::Expire(_, at) => {
                if let Some(record) = self.live(records, key, now)? {
                    let moved = Record {
                        expires_at: *at,
                        ..record
                    };
                    records.insert(key, &*codec::encode(&moved))?;
                }
            }
            Write::PutIfAbsent(_, record) => match self.live(records, key, now)? {
                Some(winner) => return Ok(Some(winner)),
                None => drop(records.insert(key, &*codec::encode(record))?),
            },
        }
        Ok(None)
    }

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

    /// Removes what is over among the next few records.
    fn sweep(
        &self,
        records: &mut Records<'_>,
        most: usize,
        now: SystemTime,
    ) -> Result<(), redb::Error> {
        let mut swept = lock(&self.swept);
        let (mut over, mut last) = (Vec::new(), Vec::new());
        for entry in beyond(records, &swept)?.take(most) {
            let (key, value) = entry?;
            // What cannot be read may be a newer version's, and is left alone.
            if codec::expires_at(value.value()).is_some_and(|at| at <= now) {
                over.push(key.value().to_owned());
            }
            last = key.value().to_owned();
        }
        for key in over {
            records.remove(&*key)?;
        }
        // Empty at the end: the next sweep begins anew.
        *swept = last;
        Ok(())
    }

    /// Reads the next few records after a key into the page, in place of what it has.
    fn read_page(&self, after: &[u8], page: &mut Page) -> Result<(), BackendError> {
        page.bytes.clear();
        page.ends.clear();
        self.with(|database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            for entry in beyond(&records, after)?.take(PAGE) {
                let (key, value) = entry?;
                page.bytes.extend_from_slice(key.value());
                let end_of_key = page.bytes.len();
                page.bytes.extend_from_slice(value.value());
                page.ends.push((end_of_key, page.bytes.len()));
            }
            Ok(())
        })
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        lock(&self.pending)
    }

    fn flush(&self) -> Result<(), BackendError> {
        if self.sync == RedbSync::Group {
            return Ok(());
        }
        // Before it is written: what comes meanwhile is for the next time.
        let waiting = std::mem::take(&mut self.pending().writes);
        if waiting {
            let synced = self.with(|database| Ok(database.begin_write()?.commit()?));
            if synced.is_err() {
                self.pending().lost = true;
            }
        }
        match std::mem::take(&mut self.pending().lost) {
            false => Ok(()),
            true => Err(BackendError::new(
                "what was written since the last flush is lost",
                None,
            )),
        }
    }

    fn sync_until_closed(&self) {
        let mut pending = self.pending();
        while !pending.closing {
            if !pending.writes {
                pending = self
                    .wake
                    .wait(pending)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let closing = |pending: &mut Pending| !pending.closing;
            let waited = self.wake.wait_timeout_while(pending, EVENTUALLY, closing);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            if self.flush().is_err() {
                // The next caller of `flush` is the one to be told.
                self.pending().lost = true;
            }
            pending = self.pending();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        close([lock(&self.database).take()]);
    }
}

impl StorageBackend for RedbBackend {
    /// Carries out the writes as one transaction: all of them, or none.
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        if writes.is_empty() {
            return Ok(Vec::new());
        }
        let shared = &*self.shared;
        let winners = shared.with(|database| shared.write(database, writes))?;
        if shared.sync == RedbSync::Eventual {
            shared.pending().writes = true;
            shared.wake.notify_one();
        }
        Ok(winners.into_iter().map(WriteOutcome::found).collect())
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let shared = &*self.shared;
        shared.with(|database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            shared.live(&records, key.as_bytes(), SystemTime::now())
        })
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let shared = &*self.shared;
        let (mut page, mut last) = (Page::default(), Vec::new());
        loop {
            shared.read_page(&last, &mut page)?;
            let now = SystemTime::now();
            for (key, value) in page.iter() {
                let Some(record) = shared.decode(value) else {
                    continue;
                };
                match std::str::from_utf8(key) {
                    Ok(key) if record.expires_at > now => visit(key, record),
                    Ok(_) => {}
                    Err(_) => shared.malformed.add(),
                }
            }
            let Some((key, _)) = page.iter().last() else {
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

/// Where the file is, and how it is got at.
struct Disk {
    path: PathBuf,
    open_file: Box<OpenFile>,
}

type OpenFile = dyn Fn(&Path) -> io::Result<Box<dyn redb::StorageBackend>> + Send + Sync;

impl Disk {
    fn open_database(&self) -> Result<Database, OpenError> {
        let file = (self.open_file)(&self.path).map_err(|error| self.refused(error.into()))?;
        let file = HeldBack::new(file);
        let mut builder = Database::builder();
        // The check is what tells a damaged file from a sound one; redb would trust a file that was closed.
        builder
            .set_cache_size(CACHE)
            .set_check_integrity_on_open(true);
        let opened = guarded(|| Ok(builder.create_with_backend(file.clone())?));
        let mut database = opened.map_err(|error| self.refused(error))?;
        // Ours from the moment that nothing is held back any more: until then, closing it changes nothing.
        match self.let_go(&mut database, &file) {
            Ok(()) => Ok(database),
            Err(error) => {
                close([Some(Arc::new(database))]);
                Err(error)
            }
        }
    }

    fn let_go(&self, database: &mut Database, file: &HeldBack) -> Result<(), OpenError> {
        let is_new = file.is_new().map_err(|error| self.io(error))?;
        match is_new {
            true => guarded(|| create_tables(database)).map_err(|error| self.refused(error))?,
            false => self.check_format(database)?,
        }
        file.let_go().map_err(|error| self.io(error))?;
        if is_new {
            sync_directory(&self.path);
        }
        guarded(|| compact(database, file)).map_err(|error| self.refused(error))
    }

    fn check_format(&self, database: &Database) -> Result<(), OpenError> {
        let path = || self.path.clone();
        let found = guarded(|| {
            let transaction = database.begin_read()?;
            let format = match transaction.open_table(META) {
                Ok(meta) => meta.get(FORMAT)?.map(|format| format.value()),
                Err(TableError::Storage(error)) => return Err(error.into()),
                Err(_) => None,
            };
            if format == Some(FORMAT_VERSION) {
                transaction.open_table(RECORDS)?;
            }
            Ok(format)
        });
        match found.map_err(|error| self.refused(error))? {
            Some(FORMAT_VERSION) => Ok(()),
            Some(found @ FORMAT_VERSION..) => Err(OpenError::NewerVersion {
                path: path(),
                found,
            }),
            Some(_) | None => Err(OpenError::NotOurs { path: path() }),
        }
    }

    fn refused(&self, error: redb::Error) -> OpenError {
        let path = self.path.clone();
        match error {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => {
                OpenError::Locked { path }
            }
            // What redb says of a file without its magic number, and we of what is no file.
            redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                OpenError::NotOurs { path }
            }
            // Of a redb older than any that we have used.
            redb::Error::UpgradeRequired(_) => OpenError::NotOurs { path },
            redb::Error::Io(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                self.io(error)
            }
            error => OpenError::Damaged {
                path,
                source: Box::new(error),
            },
        }
    }

    fn io(&self, source: io::Error) -> OpenError {
        OpenError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

fn open_file(path: &Path) -> io::Result<Box<dyn redb::StorageBackend>> {
    // A device or a pipe has no length, and would be taken for an empty file.
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    let file = FileBackend::new(options.open(path)?).map_err(io::Error::other)?;
    Ok(Box::new(file))
}

/// Has the file still be in its directory after a power cut, where that takes a step of its own.
fn sync_directory(path: &Path) {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = std::fs::File::open(parent.unwrap_or(Path::new(".")));
    // Not every system lets a directory be opened, and the others do without.
    let _ = directory.and_then(|directory| directory.sync_all());
}

fn create_tables(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction
        .open_table(META)?
        .insert(FORMAT, FORMAT_VERSION)?;
    transaction.open_table(RECORDS)?;
    Ok(transaction.commit()?)
}

/// Moves what is in use to the front of the file, where that is the smaller part of it.
fn compact(database: &mut Database, file: &HeldBack) -> Result<(), redb::Error> {
    let len = redb::StorageBackend::len(file)?;
    if len < WORTH_COMPACTING || is_surely_in_use(database, len)? {
        return Ok(());
    }
    let transaction = database.begin_write()?;
    let stats = transaction.stats()?;
    transaction.abort()?;
    if stats.allocated_pages() * stats.page_size() as u64 * 2 < len {
        database.compact()?;
    }
    Ok(())
}

/// Whether the records alone take half of the file, if the others are as long as the first few: counting the pages
/// that are in use takes a walk through all of them. A wrong guess leaves the file as large as it is.
fn is_surely_in_use(database: &Database, len: u64) -> Result<bool, redb::Error> {
    let records = database.begin_read()?.open_table(RECORDS)?;
    let (mut seen, mut bytes) = (0, 0);
    for entry in records.iter()?.take(PAGE) {
        let (key, value) = entry?;
        seen += 1;
        bytes += (key.value().len() + value.value().len()) as u64;
    }
    let all = u128::from(records.len()?) * u128::from(bytes) / u128::from(seen.max(1_u64));
    Ok(all * 2 >= u128::from(len))
}

type Entry<'a> = (
    redb::AccessGuard<'a, &'static [u8]>,
    redb::AccessGuard<'a, &'static [u8]>,
);

/// The entries after a key, in order.
fn beyond<'a>(
    records: &'a impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &[u8],
) -> Result<impl Iterator<Item = Result<Entry<'a>, redb::StorageError>>, redb::Error> {
    Ok(records.range::<&[u8]>((Bound::Excluded(key), Bound::Unbounded))?)
}

/// Has a panic of redb be an error.
///
/// redb panics where a file turns out to be damaged which it takes for sound, as one that changes beneath it after
/// it was opened. A backend must not panic, and what has panicked is closed.
fn guarded<R>(run: impl FnOnce() -> Result<R, redb::Error>) -> Result<R, redb::Error> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(redb::Error::Corrupted(format!(
            "redb panicked: {}",
            text.unwrap_or("without a word")
        )))
    })
}

/// The last one to let go of a database closes it, which writes to the file, and can fail or panic as all else.
fn close<const N: usize>(databases: [Option<Arc<Database>>; N]) {
    let closed = guarded(|| {
        drop(databases);
        Ok(())
    });
    // Nobody is left to be told; the next one to open the file brings it in order.
    let _ = closed;
}
