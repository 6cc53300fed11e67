//! The redb file survives the end of a process, however it ends; damaged and foreign files are refused.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use redb::{ReadableDatabase as _, ReadableTableMetadata as _, TableDefinition};
use tracing_workflow_context::backend::{Record, StorageBackend, Write};
use tracing_workflow_context::{
    Absence, OpenError, RedbBackend, RedbSync, WorkflowContext, WorkflowContextStorage,
};

use crate::support::*;

const ID: &str = "order-42";

const SYNCS: [RedbSync; 3] = [RedbSync::Group, RedbSync::TwoPhase, RedbSync::Eventual];

fn storage(path: &Path) -> WorkflowContextStorage {
    patient(open(path)).build().unwrap()
}

fn worker_on(path: &Path) -> Worker {
    Worker::with_storage(storage(path))
}

fn record(span: u64) -> Record {
    record_of(context(span))
}

fn puts(spans: std::ops::Range<u64>) -> Vec<Write> {
    spans
        .map(|span| Write::Put(span.to_string(), record(span)))
        .collect()
}

fn span_of(record: &Record) -> u64 {
    u64::from_be_bytes(record.context.span_id().to_bytes())
}

// Continuity.

#[test]
fn an_instance_continues_its_trace_after_a_restart() {
    for_each_via(|via| {
        let directory = Directory::new();
        let path = directory.file("contexts");
        let before = Worker::via(via, storage(&path));
        before.step("first", Tags::instance(ID));
        let first = before.span("first").span_context;
        drop(before);

        let after = Worker::via(via, storage(&path));
        assert_eq!(after.storage.instance_ids(), [ID]);
        after.step("second", Tags::instance(ID));
        after.step("third", Tags::instance(ID));
        assert_continues(&after.span("second"), &first);
        assert_continues(&after.span("third"), &first);
        let resumed = |name| attribute(&after.span(name), "workflow.resumed").is_some();
        assert_eq!((resumed("second"), resumed("third")), (true, false));
        let explanation = after.storage.explain(ID).to_string();
        assert!(explanation.contains("by another process"), "{explanation}");
        assert_eq!(after.storage.stats().malformed, 0);
    });
}

#[test]
fn runs_and_generations_survive_a_restart() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let open = || {
        let storage = patient(open(&path)).max_spans(2);
        Worker::with_storage(storage.build().unwrap())
    };
    let before = open();
    before.step("1", Tags::instance(ID).run("1"));
    for name in ["2", "2 too", "2, the next trace"] {
        before.step(name, Tags::instance(ID).run("2"));
    }
    let span = |name: &str| before.span(name).span_context;
    let (first, latest) = (span("1"), span("2, the next trace"));
    drop(before);

    let after = open();
    assert_same_span(&after.stored(ID), &latest);
    after.step("late", Tags::instance(ID).run("1"));
    after.step("2, after the restart", Tags::instance(ID).run("2"));
    after.step("2, the third trace", Tags::instance(ID).run("2"));
    after.step("3", Tags::instance(ID).run("3"));
    assert_continues(&after.span("late"), &first);
    assert_continues(&after.span("2, after the restart"), &latest);
    assert_eq!(generation(&after.span("2, the third trace")), Some(3));
    assert_eq!(links(&after.span("3"))[0].0, "new_run");
}

#[test]
fn every_part_of_a_record_survives_a_restart() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03";
    let context = WorkflowContext::parse(parent, "vendor=1,other=a b").unwrap();
    let before = worker_on(&path);
    before.storage.store(ID, context.clone()).unwrap();
    before
        .storage
        .create_resumed("resumed", Some("Planner"))
        .unwrap();
    let resumed = before.storage.get("resumed").unwrap().unwrap();
    drop(before);
    let after = storage(&path);
    assert_eq!(after.get(ID).unwrap(), Some(context));
    assert_eq!(after.get("resumed").unwrap(), Some(resumed));
}

#[test]
fn cleanup_survives_a_restart() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let before = worker_on(&path);
    before.step("first", Tags::instance(ID).run("run"));
    before.storage.flush().unwrap();
    assert!(before.storage.cleanup(ID).unwrap());
    drop(before);
    let after = worker_on(&path);
    assert_eq!(after.storage.get(ID).unwrap(), None);
    after.step("anew", Tags::instance(ID).run("run"));
    assert_root(&after.span("anew"));
}

#[test]
fn the_last_handle_of_a_storage_closes_the_file() {
    for sync in SYNCS {
        let directory = Directory::new();
        let path = directory.file("contexts");
        let backend = RedbBackend::open_with(&path, sync).unwrap();
        let worker = Worker::with_storage(patient(backend).build().unwrap());
        let storage = worker.storage.clone();
        worker.step("first", Tags::instance(ID));
        drop(worker);
        let error = RedbBackend::open(&path).unwrap_err();
        assert!(matches!(error, OpenError::Locked { .. }));
        drop(storage);
        drop(open(&path));
    }
}

/// All records were loaded at the start, and no other process writes to the file.
#[test]
fn an_instance_that_is_new_is_not_looked_up_in_the_file() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    storage(&path).store("old", context(1)).unwrap();
    let backend = RedbBackend::open(&path).unwrap();
    // Any lookup would exceed this budget.
    let storage = patient(backend)
        .lookup_budget(Duration::from_nanos(1))
        .connect_budget(Duration::ZERO);
    let worker = Worker::with_storage(storage.build().unwrap());
    for n in 0..100 {
        worker.step("new", Tags::instance(&n.to_string()).run("run"));
        assert_eq!(worker.storage.get("unknown").unwrap(), None);
    }
    let reason = worker.storage.explain("unseen").reason();
    assert_eq!(reason, Some(Absence::NeverSeen), "nothing was waited for");
}

#[test]
fn a_hundred_thousand_instances_are_loaded() {
    const INSTANCES: u64 = 100_000;
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open_with(&path, RedbSync::Eventual).unwrap();
    for some in 0..INSTANCES / 10_000 {
        backend
            .write(&puts(some * 10_000 + 1..(some + 1) * 10_000 + 1))
            .unwrap();
    }
    drop(backend);
    let bytes = fs::metadata(&path).unwrap().len() / INSTANCES;
    let start = Instant::now();
    let storage = storage(&path);
    println!(
        "{INSTANCES} instances of {bytes} bytes are loaded in {:?}",
        start.elapsed()
    );
    assert_eq!(storage.stats().stored_instances, INSTANCES);
    for span in [1, 777, INSTANCES] {
        let found = storage.get(&span.to_string()).unwrap();
        assert_eq!(found.unwrap().span_id(), context(span).span_id());
    }
}

// Expiry.

#[test]
fn expired_instances_are_gone_after_a_restart() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let clock = Past::new(Duration::from_secs(7200));
    let open = || {
        let storage = patient(RedbBackend::open(&path).unwrap())
            .clock(clock.clone())
            .idle_ttl(Duration::from_secs(3600));
        storage.build().unwrap()
    };
    let before = open();
    before.store("over", context(1)).unwrap();
    clock.set(Duration::from_secs(1800));
    before.store("idle", context(2)).unwrap();
    drop(before);

    // Nobody uses the one, and spans use the other, for another twenty minutes.
    clock.set(Duration::from_secs(600));
    let after = open();
    assert_eq!(after.instance_ids(), ["idle"]);
    assert_eq!(after.get("over").unwrap(), None);
    assert!(after.get("idle").unwrap().is_some());
}

/// A clock that is behind the system clock by a settable amount.
#[derive(Debug)]
struct Past(std::sync::Mutex<Duration>);

impl Past {
    fn new(behind: Duration) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self(std::sync::Mutex::new(behind)))
    }

    fn set(&self, behind: Duration) {
        *self.0.lock().unwrap() = behind;
    }
}

impl tracing_workflow_context::Clock for Past {
    fn now(&self) -> SystemTime {
        SystemTime::now() - *self.0.lock().unwrap()
    }
}

#[test]
fn later_writes_free_the_space_of_expired_records() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open_with(&path, RedbSync::Eventual).unwrap();
    // What had expired before the file was opened would be kept for a while.
    let over = SystemTime::now() + Duration::from_millis(1);
    for round in 0..100 {
        let writes = (0..1_000).map(|n| {
            let record = Record::new(context(n + 1), over);
            Write::Put(format!("{round} {n}, expired at once"), record)
        });
        backend.write(&writes.collect::<Vec<_>>()).unwrap();
    }
    backend.flush().unwrap();
    let len = fs::metadata(&path).unwrap().len();
    assert!(
        len < 4 * 1024 * 1024,
        "{len} bytes for 100,000 records that were all over"
    );
    for n in 0..200 {
        backend
            .write(&[Write::Put("stays".to_owned(), record(n + 1))])
            .unwrap();
    }
    drop(backend);
    assert_eq!(rows(&path), 1);
}

#[test]
fn a_mostly_empty_file_is_compacted() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open(&path).unwrap();
    backend.write(&puts(1..60_000)).unwrap();
    // The remaining records are spread over the file.
    let removed = (1..60_000_u64).filter(|span| span % 100 != 0);
    let removed: Vec<_> = removed
        .map(|span| Write::Remove(span.to_string()))
        .collect();
    backend.write(&removed).unwrap();
    drop(backend);
    let before = fs::metadata(&path).unwrap().len();
    let backend = RedbBackend::open(&path).unwrap();
    drop(backend);
    let after = fs::metadata(&path).unwrap().len();
    println!("{before} bytes became {after}");
    assert!(after < 1024 * 1024, "{before} bytes became {after}");
    let backend = RedbBackend::open(&path).unwrap();
    let mut found = BTreeSet::new();
    backend
        .scan(&mut |_, record| assert!(found.insert(span_of(&record))))
        .unwrap();
    assert!(found.into_iter().eq((100..60_000).step_by(100)));
}

/// Returns the number of records in the file.
fn rows(path: &Path) -> u64 {
    let database = redb::Database::open(path).unwrap();
    let records = database.begin_read().unwrap().open_table(RECORDS).unwrap();
    records.len().unwrap()
}

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("tracing-workflow-context");
const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

// Foreign and damaged files.

#[test]
fn a_file_that_another_process_has_open_is_refused() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    storage(&path).store(ID, context(1)).unwrap();
    let mut holder = Role::Hold.start(&path);
    let said = BufReader::new(holder.stdout.take().unwrap()).lines();
    let is_open = said.map_while(Result::ok).any(|line| line == "it is open");
    assert!(is_open);
    let before = fs::read(&path).unwrap();
    for sync in SYNCS {
        let error = RedbBackend::open_with(&path, sync).unwrap_err();
        assert!(matches!(&error, OpenError::Locked { path: named } if *named == path));
        let message = error.to_string();
        assert!(
            message.contains("open already") && message.contains("contexts"),
            "{message}"
        );
    }
    assert!(fs::read(&path).unwrap() == before, "the file was changed");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(storage(&path).get(ID).unwrap().is_some());
}

/// A process that is being started has a copy of each open file, and of its lock, until it runs its own program.
#[cfg(unix)]
#[test]
fn a_file_is_created_and_opened_again_while_other_threads_start_processes() {
    let directory = Directory::new();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    Command::new("true").status().unwrap();
                }
            });
        }
        let refused = (0..100).filter(|n| {
            let path = directory.file(&n.to_string());
            (0..2).any(|_| RedbBackend::open(&path).is_err())
        });
        let refused = refused.count();
        is_over.store(true, Relaxed);
        assert_eq!(refused, 0, "of 100");
    });
}

#[test]
fn another_backend_of_this_process_is_refused() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open(&path).unwrap();
    assert!(matches!(
        RedbBackend::open(&path),
        Err(OpenError::Locked { .. })
    ));
    backend.write(&puts(1..10)).unwrap();
    drop(backend);
    assert_eq!(
        RedbBackend::open(&path)
            .unwrap()
            .get("5")
            .unwrap()
            .as_ref()
            .map(span_of),
        Some(5)
    );
}

#[test]
fn a_file_of_another_application_is_refused_and_unchanged() {
    let directory = Directory::new();
    let other: TableDefinition<'_, &str, &str> = TableDefinition::new("other");
    let same_name: TableDefinition<'_, u64, &[u8]> =
        TableDefinition::new("tracing-workflow-context");

    let text = directory.file("text");
    fs::write(&text, "Dear diary,").unwrap();
    let one_byte = directory.file("one byte");
    fs::write(&one_byte, "d").unwrap();
    let zeros = directory.file("zeros");
    fs::write(&zeros, [0; 100_000]).unwrap();
    let sqlite = directory.file("sqlite");
    fs::write(
        &sqlite,
        [b"SQLite format 3\0".as_slice(), &[7; 4096]].concat(),
    )
    .unwrap();
    let magic = directory.file("the magic number of redb alone");
    fs::write(&magic, b"redb\x1a\x0a\xa9\x0d\x0a").unwrap();

    let another = directory.file("another redb database");
    insert(
        &redb::Database::create(&another).unwrap(),
        other,
        "key",
        "value",
    );
    let crashed = directory.file("another redb database that was not closed");
    {
        let open = directory.file("open");
        let database = redb::Database::create(&open).unwrap();
        insert(&database, other, "key", "value");
        fs::copy(&open, &crashed).unwrap();
    }
    let empty = directory.file("an empty redb database");
    drop(redb::Database::create(&empty).unwrap());
    let similar = directory.file("a table of the same name");
    insert(
        &redb::Database::create(&similar).unwrap(),
        same_name,
        1,
        b"value".as_slice(),
    );
    let no_version = directory.file("no version");
    insert(
        &redb::Database::create(&no_version).unwrap(),
        META,
        "formal",
        1,
    );
    let version_0 = directory.file("version 0");
    insert(
        &redb::Database::create(&version_0).unwrap(),
        META,
        "format",
        0,
    );

    for path in [
        text, one_byte, zeros, sqlite, another, crashed, empty, similar, no_version, version_0,
    ] {
        let (before, modified) = (
            fs::read(&path).unwrap(),
            fs::metadata(&path).unwrap().modified().unwrap(),
        );
        for sync in SYNCS {
            let error = RedbBackend::open_with(&path, sync).unwrap_err();
            assert!(
                matches!(&error, OpenError::NotOurs { .. }),
                "{path:?}: {error:?}"
            );
            let message = error.to_string();
            assert!(
                message.contains("not a workflow-context database"),
                "{message}"
            );
            assert!(message.contains(&path.display().to_string()), "{message}");
        }
        assert!(fs::read(&path).unwrap() == before, "{path:?} was changed");
        assert_eq!(
            fs::metadata(&path).unwrap().modified().unwrap(),
            modified,
            "{path:?} was touched"
        );
    }
    let before = fs::read(&magic).unwrap();
    assert!(matches!(
        RedbBackend::open(&magic),
        Err(OpenError::Damaged { .. })
    ));
    assert_eq!(fs::read(&magic).unwrap(), before);
}

fn insert<'a, K: redb::Key, V: redb::Value>(
    database: &redb::Database,
    table: TableDefinition<'_, K, V>,
    key: impl std::borrow::Borrow<K::SelfType<'a>>,
    value: impl std::borrow::Borrow<V::SelfType<'a>>,
) {
    let transaction = database.begin_write().unwrap();
    transaction
        .open_table(table)
        .unwrap()
        .insert(key, value)
        .unwrap();
    transaction.commit().unwrap();
}

#[test]
fn a_path_that_is_not_a_file_is_refused() {
    let directory = Directory::new();
    let error = RedbBackend::open(directory.path()).unwrap_err();
    assert!(matches!(&error, OpenError::NotOurs { .. }), "{error:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    if cfg!(unix) {
        let error = RedbBackend::open("/dev/null").unwrap_err();
        assert!(matches!(&error, OpenError::NotOurs { .. }), "{error:?}");
    }
    let nowhere = directory.file("no such directory/contexts");
    let error = RedbBackend::open(&nowhere).unwrap_err();
    assert!(matches!(&error, OpenError::Io { .. }), "{error:?}");
    let source = error
        .source()
        .and_then(|source| source.downcast_ref::<std::io::Error>());
    assert_eq!(source.unwrap().kind(), std::io::ErrorKind::NotFound);
}

#[cfg(unix)]
#[test]
fn a_new_file_is_its_owners_alone_and_no_link_chooses_where_it_is() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    let directory = Directory::new();
    let path = directory.file("contexts");
    drop(storage(&path));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // One that is there keeps what its owner has given it, and may be linked to.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let link = directory.file("link");
    symlink(&path, &link).unwrap();
    drop(storage(&link));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);

    let (dangling, elsewhere) = (directory.file("dangling"), directory.file("elsewhere"));
    symlink(&elsewhere, &dangling).unwrap();
    let error = RedbBackend::open(&dangling).unwrap_err();
    assert!(matches!(&error, OpenError::Io { .. }), "{error:?}");
    assert!(!elsewhere.exists());
}

#[cfg(unix)]
#[test]
fn a_flush_fails_once_the_file_was_deleted_or_replaced() {
    for sync in SYNCS {
        for replaced in [false, true] {
            let directory = Directory::new();
            let path = directory.file("contexts");
            let backend = RedbBackend::open_with(&path, sync).unwrap();
            backend.write(&puts(1..10)).unwrap();
            backend.flush().unwrap();
            if replaced {
                let other = directory.file("other");
                drop(RedbBackend::open(&other).unwrap());
                fs::rename(&other, &path).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
            for _ in 0..2 {
                let _ = backend.write(&puts(10..20));
                let error = backend.flush().unwrap_err();
                assert!(error.to_string().contains("deleted or replaced"), "{error}");
            }
            assert_eq!(path.exists(), replaced, "it is not made anew in silence");
            drop(backend);
            let backend = RedbBackend::open_with(&path, sync).unwrap();
            backend.write(&puts(1..10)).unwrap();
            backend.flush().unwrap();
        }
    }
}

#[test]
fn an_empty_file_is_initialised() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    fs::write(&path, "").unwrap();
    storage(&path).store(ID, context(1)).unwrap();
    assert!(storage(&path).get(ID).unwrap().is_some());
}

#[test]
fn a_file_of_a_newer_version_is_refused_and_unchanged() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    storage(&path).store(ID, context(1)).unwrap();
    insert(&redb::Database::open(&path).unwrap(), META, "format", 2);
    let before = fs::read(&path).unwrap();
    let error = RedbBackend::open(&path).unwrap_err();
    assert!(
        matches!(&error, OpenError::NewerVersion { found: 2, .. }),
        "{error:?}"
    );
    let message = error.to_string();
    assert!(
        message.contains("format 2") && message.contains("up to 1"),
        "{message}"
    );
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn a_truncated_file_is_refused_and_unchanged() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open(&path).unwrap();
    backend.write(&puts(1..5_000)).unwrap();
    drop(backend);
    let whole = fs::read(&path).unwrap();
    let pages = whole.len() / 4096;
    let lens = [
        1,
        8,
        9,
        10,
        100,
        319,
        320,
        4095,
        4096,
        4097,
        whole.len() / 2,
        whole.len() - 1,
    ];
    let lens = lens
        .into_iter()
        .chain((1..pages).step_by(17).map(|page| page * 4096));
    for len in lens {
        fs::write(&path, &whole[..len]).unwrap();
        let error = RedbBackend::open(&path).unwrap_err();
        match &error {
            OpenError::Damaged { source, .. } => assert!(len >= 9, "{len}: {source}"),
            OpenError::NotOurs { .. } => assert!(len < 9, "{len}"),
            other => panic!("{len}: {other:?}"),
        }
        assert!(fs::read(&path).unwrap() == whole[..len], "{len}");
    }
    fs::write(&path, &whole).unwrap();
    drop(RedbBackend::open(&path).unwrap());
}

#[test]
fn a_damaged_file_is_refused_and_unchanged() {
    const RECORDS: u64 = 3_000;
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open(&path).unwrap();
    backend.write(&puts(1..RECORDS)).unwrap();
    // Also one that a process has left open: its last commit is not marked as the end.
    let (closed, left_open) = (directory.file("closed"), directory.file("left open"));
    fs::copy(&path, &left_open).unwrap();
    drop(backend);
    fs::copy(&path, &closed).unwrap();

    let mut refused = 0;
    for seed in 0..200 {
        let whole = fs::read(if seed % 2 == 0 { &closed } else { &left_open }).unwrap();
        let mut random = Random::new(seed);
        let mut damaged = whole.clone();
        for _ in 0..1 + random.below(4) {
            // Half of them where the file begins.
            let most = if random.below(2) == 0 {
                512
            } else {
                whole.len()
            };
            let from = random.below(most);
            let to = whole.len().min(from + [1, 8, 512, 4096][random.below(4)]);
            match random.below(3) {
                0 => damaged[from] ^= 1 << random.below(8),
                1 => damaged[from..to].fill(random.next() as u8),
                _ => damaged[from..to]
                    .iter_mut()
                    .for_each(|byte| *byte = random.next() as u8),
            }
        }
        fs::write(&path, &damaged).unwrap();
        match RedbBackend::open(&path) {
            Err(error) => {
                refused += 1;
                let expected = matches!(
                    &error,
                    OpenError::Damaged { .. } | OpenError::NotOurs { .. }
                );
                assert!(expected, "seed {seed}: {error:?}");
                assert!(fs::read(&path).unwrap() == damaged, "seed {seed}");
            }
            // The damage hit unused bytes.
            Ok(backend) => {
                for span in (1..RECORDS).step_by(7) {
                    let found = backend.get(&span.to_string()).unwrap();
                    let found = found.as_ref().map(span_of);
                    assert!(
                        found.is_none_or(|found| found == span),
                        "seed {seed}: {found:?}"
                    );
                }
                backend.write(&puts(1..10)).unwrap();
            }
        }
    }
    println!("{refused} of 200 damaged files were refused");
    assert!(refused > 60, "{refused} of 200 damaged files were refused");
}

/// Damage to all that the last group of writes has changed, as by a disk that has lost them.
#[test]
fn damage_to_the_last_writes_is_noticed_with_two_syncs_a_group() {
    for sync in [RedbSync::Group, RedbSync::TwoPhase] {
        let directory = Directory::new();
        let path = directory.file("contexts");
        let backend = RedbBackend::open_with(&path, sync).unwrap();
        backend.write(&puts(1..1_000)).unwrap();
        let before = fs::read(&path).unwrap();
        backend.write(&puts(1_000..1_100)).unwrap();
        // Left open, as by a crash.
        let mut damaged = fs::read(&path).unwrap();
        drop(backend);
        // The first page says which group is the last.
        for (at, byte) in damaged.iter_mut().enumerate().skip(4096) {
            if before.get(at) != Some(byte) {
                *byte ^= 0xff;
            }
        }
        fs::write(&path, &damaged).unwrap();
        let opened = RedbBackend::open_with(&path, sync);
        match (sync, opened) {
            (RedbSync::TwoPhase, Err(OpenError::Damaged { .. })) => {}
            (RedbSync::Group, Ok(backend)) => {
                assert!(backend.get("999").unwrap().is_some());
                assert!(
                    backend.get("1000").unwrap().is_none(),
                    "as if it was never written"
                );
            }
            (_, opened) => panic!("{sync:?}: {opened:?}"),
        }
    }
}

#[test]
fn undecodable_records_are_counted_and_skipped() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    storage(&path).store("known", context(1)).unwrap();
    {
        let database = redb::Database::open(&path).unwrap();
        let newer = [&[2][..], &[0xff; 46]].concat();
        for (key, value) in [
            (b"garbage".as_slice(), b"garbage".as_slice()),
            (b"empty", b""),
            (b"newer", &newer),
        ] {
            insert(&database, RECORDS, key, value);
        }
        let known = database.begin_read().unwrap().open_table(RECORDS).unwrap();
        let known = redb::ReadableTable::get(&known, b"known".as_slice())
            .unwrap()
            .unwrap()
            .value()
            .to_owned();
        insert(&database, RECORDS, b"no text \xff".as_slice(), &*known);
    }
    let storage = storage(&path);
    let stats = storage.stats();
    assert_eq!((stats.stored_instances, stats.malformed), (1, 4));
    assert_eq!(storage.get("garbage").unwrap(), None);
    storage.store("garbage", context(2)).unwrap();
    storage.flush().unwrap();
    drop(storage);
    let storage = self::storage(&path);
    assert_eq!(
        storage.get("garbage").unwrap().unwrap().span_id(),
        context(2).span_id()
    );
    assert_eq!(
        storage.stats().malformed,
        3,
        "the newer version's is still there, and the others"
    );
}

// The end of a process.

#[test]
fn eventual_sync_writes_within_a_second() {
    let directory = Directory::new();
    let path = directory.file("contexts");
    let backend = RedbBackend::open_with(&path, RedbSync::Eventual).unwrap();
    backend.write(&puts(1..10)).unwrap();
    let copy = directory.file("copy");
    let start = Instant::now();
    loop {
        // A copy is what another process would find if this one were killed now; it may be torn.
        fs::copy(&path, &copy).unwrap();
        let found = RedbBackend::open(&copy)
            .ok()
            .and_then(|copy| copy.get("5").unwrap());
        if found.is_some() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "it is not on the disk");
        thread::sleep(Duration::from_millis(50));
    }
    println!("on the disk within {:?}", start.elapsed());
}

/// Needs root on Linux, to mount a small file system; `a_full_disk_costs_no_write_that_was_answered` simulates the same.
#[test]
fn a_disk_that_was_full_has_all_that_was_written_once_a_flush_succeeds() {
    for sync in SYNCS {
        let directory = Directory::new();
        let Some(mount) = Mount::tmpfs(directory.path(), "size=2m") else {
            println!("skipped: no file system can be mounted");
            return;
        };
        let path = directory.file("contexts");
        let backend = RedbBackend::open_with(&path, sync).unwrap();
        let (mut answered, mut failed) = (Vec::new(), 0);
        for n in 0..30 {
            let spans = 1 + 1_000 * n..1 + 1_000 * (n + 1);
            match backend.write(&puts(spans.clone())) {
                Ok(_) => answered.push(spans),
                Err(_) => failed += 1,
            }
            failed += usize::from(backend.flush().is_err());
        }
        assert!(failed > 0 && !answered.is_empty(), "{sync:?}: {failed}");
        mount.change("size=64m");
        backend.flush().unwrap();
        drop(backend);
        let backend = RedbBackend::open(&path).unwrap();
        for span in answered.into_iter().flatten() {
            let found = backend.get(&span.to_string()).unwrap();
            assert_eq!(found.as_ref().map(span_of), Some(span), "{sync:?}");
        }
    }
}

/// Kills a writing process many times, and checks the file after each kill.
#[test]
fn kill_9_at_any_moment_loses_nothing_that_was_flushed_and_the_file_always_opens() {
    const KILLS: u64 = 200;
    const KILLS_OF_ONE_FILE: u64 = 20;
    let seed = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let seed = std::env::var("KILL_SEED").map_or(seed, |seed| seed.parse().unwrap());
    println!("KILL_SEED={seed}");
    let start = Instant::now();
    let mut random = Random::new(seed);
    let directory = Directory::new();
    let (mut acknowledged, mut total, mut early) = (0, 0, 0);
    let mut path = PathBuf::new();
    for kill in 0..KILLS {
        if kill % KILLS_OF_ONE_FILE == 0 {
            path = directory.file(&format!("contexts {kill}"));
            acknowledged = 0;
        }
        let mut worker = Role::Work { from: acknowledged }.start(&path);
        // The delay includes the start of the process: some are killed while they create or repair the file.
        let moment = [10_000, 50_000, 200_000][random.below(3)];
        thread::sleep(Duration::from_micros(random.below(moment) as u64));
        worker.kill().unwrap();
        worker.wait().unwrap();
        let mut said = String::new();
        worker
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        let mut flushed = said
            .lines()
            .filter_map(|line| line.strip_prefix("flushed "));
        let last = flushed.next_back().map(|last| last.parse::<u64>().unwrap());
        early += u64::from(last.is_none());
        acknowledged = last.unwrap_or(acknowledged);

        let backend = RedbBackend::open(&path);
        let backend = backend.unwrap_or_else(|error| panic!("seed {seed}, kill {kill}: {error:?}"));
        let mut found = BTreeSet::new();
        let visit = &mut |key: &str, record: Record| {
            assert_eq!(key, span_of(&record).to_string());
            found.insert(span_of(&record));
        };
        backend.scan(visit).unwrap();
        let lost = (1..=acknowledged).find(|span| !found.contains(span));
        assert_eq!(
            lost, None,
            "seed {seed}, kill {kill}: {acknowledged} were flushed"
        );
        assert_eq!(backend.malformed(), 0);
        total += last.map_or(0, |_| 1);
    }
    println!(
        "{total} of {KILLS} killed after a flush, {early} before, in {:?}",
        start.elapsed()
    );
    assert!(
        total > 20,
        "too few processes flushed before they were killed: {total}"
    );
}

/// The task of a child process.
enum Role {
    Hold,
    /// Stores and flushes without end, from that number on.
    Work {
        from: u64,
    },
}

impl Role {
    fn start(self, path: &Path) -> Child {
        let mut command = test_process(module_path!(), "another_process");
        command
            .env("RESTART_PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        match self {
            Self::Hold => command.env("RESTART_ROLE", "hold"),
            Self::Work { from } => command
                .env("RESTART_ROLE", "work")
                .env("RESTART_FROM", from.to_string()),
        };
        command.spawn().unwrap()
    }
}

/// The body of a child process; without a role it does nothing.
#[test]
fn another_process() {
    let (Ok(role), Ok(path)) = (std::env::var("RESTART_ROLE"), std::env::var("RESTART_PATH"))
    else {
        return;
    };
    if role == "hold" {
        let _backend = RedbBackend::open(path).unwrap();
        say("it is open");
        // Until it is killed, or its parent has ended.
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    let from: u64 = std::env::var("RESTART_FROM").unwrap().parse().unwrap();
    let backend = RedbBackend::open_with(path, SYNCS[from as usize % SYNCS.len()]).unwrap();
    let storage = patient(backend).build().unwrap();
    let mut random = Random::new(from);
    let mut span = from;
    loop {
        for _ in 0..1 + random.below(40) {
            span += 1;
            storage.store(&span.to_string(), context(span)).unwrap();
        }
        storage.flush().unwrap();
        say(&format!("flushed {span}"));
    }
}

/// Writes a line in one system call, so that it is complete or missing. Panics when the reader is gone.
fn say(what: &str) {
    let line = format!("\n{what}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}
