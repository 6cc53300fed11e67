//! Opening the file: creation, the check that it is ours, and which failures mean what.
//!
//! A foreign file stays untouched to the last byte, although redb writes to each database that it opens. So the format
//! is first looked up in a [`Scratch`], and redb opens the file itself only if it is ours.
//!
//! A file that was being created when the process or the machine died is recognised, and created again: it begins with
//! [`UNFINISHED`] until all the rest is on the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{
    Builder, Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageBackend,
    TableDefinition, TableError,
};

use super::scratch::Scratch;

/// Holds the version of the format under [`FORMAT`]. The name of the table identifies our files.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("tracing-workflow-context");
const FORMAT: &str = "format";
const FORMAT_VERSION: u64 = 1;

/// Keys, which are text, and records as [`codec`](crate::backend::codec) encodes them.
pub(super) const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

/// Limit of redb's cache. Its own default is 1 GiB.
const CACHE: usize = 32 * 1024 * 1024;

/// A file of at least this many bytes is compacted at opening if less than half of it is in use.
const WORTH_COMPACTING: u64 = 4 * 1024 * 1024;

/// Number of records whose size stands for that of all records.
const SAMPLE: usize = 1024;

/// The first bytes of a file that is being created.
const UNFINISHED: &[u8] = b"workflow contexts, being created";

/// The first page of a database has redb's header, without which the rest is no database.
const FIRST_PAGE: usize = 4096;

/// Why a [`RedbBackend`](super::RedbBackend) could not be opened. The file was not changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has the file open, or another backend of this one. A storage has it open until its last handle is dropped: a
    /// subscriber is one, and `tracing` can hold that for some milliseconds longer, while another thread registers a callsite.
    #[error("{}: the file is open already, in this process or in another one", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The path is that of something else: another program's database, any other file, or a directory or device.
    #[error("{}: not a workflow-context database", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// A newer version of this crate has written the file.
    #[error(
        "{}: the file has format {found}, but this version of the crate reads formats up to {FORMAT_VERSION}",
        path.display()
    )]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// The version of its format.
        found: u64,
    },
    /// The file was truncated, or changed by another program, and its content cannot be trusted. Without the file,
    /// instances that are under way begin new traces.
    #[error("{}: the file is damaged; remove it to start with an empty one", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage that redb found.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The operating system failed to open, read or write the file.
    #[error("{}: cannot open the file", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// The path of the file and the way to open it, which tests replace by a simulated disk.
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) open_file: Box<dyn OpenFile>,
}

/// A function that opens a file, with the type of its result hidden.
pub(super) trait OpenFile: Send + Sync {
    fn file(&self, path: &Path) -> io::Result<Box<dyn StorageBackend>>;

    fn database(&self, path: &Path, builder: &Builder) -> Result<Database, redb::Error>;
}

impl<F, B> OpenFile for F
where
    F: Fn(&Path) -> io::Result<B> + Send + Sync,
    B: StorageBackend,
{
    fn file(&self, path: &Path) -> io::Result<Box<dyn StorageBackend>> {
        Ok(Box::new(self(path)?))
    }

    fn database(&self, path: &Path, builder: &Builder) -> Result<Database, redb::Error> {
        Ok(builder.create_with_backend(self(path)?)?)
    }
}

impl Disk {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            open_file: Box::new(open_file),
        }
    }

    pub(super) fn open_database(&self) -> Result<Database, OpenError> {
        let len = self.prepare()?;
        // If another process locks the file before redb does, this one fails as if it had come later.
        let opened = guarded(|| {
            let mut builder = builder();
            // Without the check, redb trusts a file that was closed properly, however damaged it is.
            builder.set_check_integrity_on_open(true);
            let mut database = self.open_file.database(&self.path, &builder)?;
            compact(&mut database, len)?;
            Ok(database)
        });
        opened.map_err(|error| self.refused(error))
    }

    /// Creates the file if it is new, else checks that it is ours. Returns its length.
    fn prepare(&self) -> Result<u64, OpenError> {
        let file = self.open_file.file(&self.path);
        let file: Arc<dyn StorageBackend> =
            file.map_err(|error| self.refused(error.into()))?.into();
        match file.try_lock_range(Bound::Unbounded, Bound::Unbounded) {
            // On a file system without locks, redb opens the file too.
            Ok(true) | Err(redb::BackendError::Unsupported) => {}
            Ok(false) => return Err(self.refused(redb::Error::DatabaseAlreadyOpen)),
            Err(error) => return Err(self.io(io::Error::other(error))),
        }
        let len = self.create_or_check(&file);
        // It unlocks the file. To drop it is not enough: a process that another thread is starting has a copy of the
        // descriptor until it runs its own program, and the lock lives as long as either.
        let _ = file.close();
        len
    }

    fn create_or_check(&self, file: &Arc<dyn StorageBackend>) -> Result<u64, OpenError> {
        let io = |error| self.io(error);
        if is_unfinished(&**file).map_err(io)? {
            guarded(|| create(&**file)).map_err(|error| self.refused(error))?;
            sync_directory(&self.path);
            return file.len().map_err(io);
        }
        let len = file.len().map_err(io)?;
        self.check_format(Scratch::from_file(file.clone()).map_err(io)?)?;
        Ok(len)
    }

    fn check_format(&self, file: Scratch) -> Result<(), OpenError> {
        let found = guarded(|| {
            let database = builder().create_with_backend(file)?;
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
        let path = || self.path.clone();
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
            // From redb for a file without its magic number, and from `open_file` for a directory or device.
            redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                OpenError::NotOurs { path }
            }
            // A file format of redb that is older than this crate.
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

    pub(super) fn io(&self, source: io::Error) -> OpenError {
        OpenError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

fn builder() -> Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder
}

fn open_file(path: &Path) -> io::Result<FileBackend> {
    // A device or a pipe has no length, and would be taken for an empty file.
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let mut opened = options.open(path);
    if matches!(&opened, Err(error) if error.kind() == io::ErrorKind::NotFound) {
        opened = create_file(path, options.clone());
    }
    if matches!(&opened, Err(error) if error.kind() == io::ErrorKind::AlreadyExists) {
        // Another process was faster.
        opened = options.open(path);
    }
    FileBackend::new(opened?).map_err(io::Error::other)
}

/// Creates a file that only its owner can read: it says which workflows there are.
fn create_file(path: &Path, mut options: OpenOptions) -> io::Result<File> {
    if path.is_symlink() {
        let message = "a symbolic link that leads nowhere, where no file is created";
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    // It follows no link that has been put there since.
    options.create_new(true).open(path)
}

/// Tells one file from another: its device and its number there.
pub(super) type Identity = (u64, u64);

/// Returns the identity of the file that a path leads to; `None` if there is none, or on systems other than Unix, where
/// an open file stays where it is.
pub(super) fn identity(path: &Path) -> Option<Identity> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let file = path.metadata().ok()?;
        Some((file.dev(), file.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Returns `true` for an empty file, and for one whose creation was interrupted.
fn is_unfinished(file: &dyn StorageBackend) -> io::Result<bool> {
    let len = usize::try_from(file.len()?).unwrap_or(usize::MAX);
    let mut first = vec![0; UNFINISHED.len().min(len)];
    file.read(0, &mut first)?;
    // A power cut can keep the length of the first write and lose some of its bytes.
    let mut bytes = first.iter().zip(UNFINISHED);
    let is_torn =
        len <= UNFINISHED.len() && bytes.all(|(byte, expected)| *byte == 0 || byte == expected);
    Ok(is_torn || first == UNFINISHED)
}

/// Writes an empty database of ours, the page that makes it one last.
fn create(file: &dyn StorageBackend) -> Result<(), redb::Error> {
    let scratch = Scratch::new();
    let database = builder().create_with_backend(scratch.clone())?;
    let transaction = database.begin_write()?;
    transaction
        .open_table(META)?
        .insert(FORMAT, FORMAT_VERSION)?;
    transaction.open_table(RECORDS)?;
    transaction.commit()?;
    drop(database);

    let image = scratch.contents()?;
    let (first, rest) = image.split_at(image.len().min(FIRST_PAGE));
    if file.len()? != 0 {
        file.set_len(0)?;
    }
    file.write(0, UNFINISHED)?;
    file.sync_data()?;
    file.set_len(image.len() as u64)?;
    file.write(FIRST_PAGE as u64, rest)?;
    file.sync_data()?;
    file.write(0, first)?;
    Ok(file.sync_data()?)
}

/// Makes the directory entry of a new file durable, on systems where syncing the file does not.
fn sync_directory(path: &Path) {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new(".")));
    // Systems that do not let a directory be opened do not need this.
    let _ = directory.and_then(|directory| directory.sync_all());
}

/// Moves the pages in use to the front of the file, and truncates it, if they are less than half of it.
fn compact(database: &mut Database, len: u64) -> Result<(), redb::Error> {
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

/// Estimates from the first records whether all of them take half of the file: counting the pages in use visits each
/// of them. A wrong estimate leaves the file as large as it is.
fn is_surely_in_use(database: &Database, len: u64) -> Result<bool, redb::Error> {
    let records = database.begin_read()?.open_table(RECORDS)?;
    let (mut seen, mut bytes) = (0, 0);
    for entry in records.iter()?.take(SAMPLE) {
        let (key, value) = entry?;
        seen += 1;
        bytes += (key.value().len() + value.value().len()) as u64;
    }
    let all = u128::from(records.len()?) * u128::from(bytes) / u128::from(seen.max(1_u64));
    Ok(all * 2 >= u128::from(len))
}

/// Turns a panic of redb into an error.
///
/// redb panics on some damage that it does not expect, as in a file that was changed after it was opened. A backend
/// must not panic; a database that has panicked is closed.
pub(super) fn guarded<R>(run: impl FnOnce() -> Result<R, redb::Error>) -> Result<R, redb::Error> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(redb::Error::Corrupted(format!(
            "redb panicked: {}",
            text.unwrap_or("no message")
        )))
    })
}

/// Drops databases. The last handle closes the file, which writes to it, and can fail or panic.
pub(super) fn close<const N: usize>(databases: [Option<Arc<Database>>; N]) {
    let closed = guarded(|| {
        drop(databases);
        Ok(())
    });
    // There is no caller to tell; the next one that opens the file repairs it.
    let _ = closed;
}
