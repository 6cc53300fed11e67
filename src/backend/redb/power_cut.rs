//! Tests on a simulated disk that honours fsync and guarantees nothing more: power cuts at every moment of a file's
//! life, a full disk, and damage while the file is open.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use redb::StorageBackend as File;

use super::*;
use crate::context::WorkflowContext;

const SECTOR: usize = 512;

/// A file on the disk. Clones are the same file.
#[derive(Clone, Debug, Default)]
struct Platter(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The content that processes see.
    seen: Vec<u8>,
    /// The content that a power cut cannot change.
    synced: Vec<u8>,
    /// Operations that the disk may have carried out, wholly or in part.
    unsynced: Vec<Operation>,
    /// Number of operations until the power cut.
    power: Option<usize>,
    /// Number of operations so far.
    operations: usize,
    has_room: bool,
}

#[derive(Clone, Debug)]
enum Operation {
    SetLen(u64),
    Write(u64, Vec<u8>),
}

impl Operation {
    fn carry_out(&self, file: &mut Vec<u8>, is_done: &mut dyn FnMut() -> bool) {
        match self {
            Self::SetLen(len) => file.resize(*len as usize, 0),
            Self::Write(at, bytes) => {
                let at = *at as usize;
                // A sector is written as a whole, but the file may come to include it without that.
                let end = at + bytes.len();
                file.resize(file.len().max(end), 0);
                let mut from = at;
                while from < end {
                    let to = end.min((from / SECTOR + 1) * SECTOR);
                    if is_done() {
                        file[from..to].copy_from_slice(&bytes[from - at..to - at]);
                    }
                    from = to;
                }
            }
        }
    }
}

impl Platter {
    fn new(power: Option<usize>) -> Self {
        let state = State {
            power,
            has_room: true,
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Returns the file as it may be found after a power cut.
    fn after_power_cut(&self, random: &mut Random, power: Option<usize>) -> Self {
        let state = self.state();
        let mut file = state.synced.clone();
        for operation in &state.unsynced {
            // All sectors of it, some, or none.
            let chance = [0, 50, 90, 100][random.below(4)];
            let mut is_done = || random.below(100) < chance;
            if (matches!(operation, Operation::Write(..)) || is_done()) && chance > 0 {
                operation.carry_out(&mut file, &mut is_done);
            }
        }
        let disk = Self::new(power);
        {
            let mut state = disk.state();
            state.seen.clone_from(&file);
            state.synced = file;
        }
        disk
    }

    fn operations(&self) -> usize {
        self.state().operations
    }

    fn set_room(&self, has_room: bool) {
        self.state().has_room = has_room;
    }

    fn open(&self, sync: RedbSync) -> Result<RedbBackend, OpenError> {
        let file = self.clone();
        let open_file = Box::new(move |_: &Path| Ok(file.clone()));
        let path = PathBuf::from("a file on a simulated disk");
        RedbBackend::open_on(Disk { path, open_file }, sync, None)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    fn operate(&self, operation: Operation) -> io::Result<()> {
        let mut state = self.state();
        state.use_power()?;
        if !state.has_room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        operation.carry_out(&mut state.seen, &mut || true);
        state.unsynced.push(operation);
        Ok(())
    }
}

impl State {
    fn use_power(&mut self) -> io::Result<()> {
        if self.power.is_some_and(|power| self.operations >= power) {
            return Err(io::Error::other("there is no power"));
        }
        self.operations += 1;
        Ok(())
    }
}

impl File for Platter {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        let from = offset as usize;
        let bytes = state.seen.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.operate(Operation::SetLen(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state();
        state.use_power()?;
        state.synced = state.seen.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.operate(Operation::Write(offset, data.to_vec()))
    }
}

/// A pseudo-random generator with a seed, so that failures can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn record(span: u64) -> Record {
    let parent = format!("00-0af7651916cd43dd8448eb211c80319c-{span:016x}-01");
    let context = WorkflowContext::parse(&parent, "").expect("well formed");
    Record::new(context, SystemTime::now() + Duration::from_secs(3600))
}

fn span_of(record: &Record) -> u64 {
    u64::from_be_bytes(record.context.span_id().to_bytes())
}

/// The possible values of a few keys: those that a flush acknowledged, and those written since.
#[derive(Debug, Default)]
struct Expected {
    acknowledged: [Option<u64>; KEYS],
    since: [Vec<Option<u64>>; KEYS],
    rounds: u64,
}

const KEYS: usize = 32;

fn key(n: usize) -> String {
    format!("order {n} {}", "x".repeat(n * 13 % 200))
}

impl Expected {
    /// Writes and flushes until something fails.
    fn work(
        &mut self,
        backend: &RedbBackend,
        rounds: u64,
        random: &mut Random,
    ) -> Result<(), BackendError> {
        for _ in 0..rounds {
            self.rounds += 1;
            let mut writes = Vec::new();
            for _ in 0..1 + random.below(30) {
                let n = random.below(KEYS);
                let (write, after) = match random.below(5) {
                    0 => (Write::Remove(key(n)), None),
                    _ => (Write::Put(key(n), record(self.rounds)), Some(self.rounds)),
                };
                self.since[n].push(after);
                writes.push(write);
            }
            backend.write(&writes)?;
            if random.below(3) == 0 {
                backend.flush()?;
                for (acknowledged, since) in self.acknowledged.iter_mut().zip(&mut self.since) {
                    if let Some(last) = since.pop() {
                        *acknowledged = last;
                    }
                    since.clear();
                }
            }
        }
        Ok(())
    }

    /// Asserts that each key has a possible value, which from now on is the only one.
    fn check(&mut self, backend: &RedbBackend, what: &str) {
        for n in 0..KEYS {
            let found = backend
                .get(&key(n))
                .expect("the disk works")
                .as_ref()
                .map(span_of);
            let possible = self.since[n].iter().chain([&self.acknowledged[n]]);
            assert!(
                possible.into_iter().any(|possible| *possible == found),
                "{what}: {found:?} under key {n} of {self:?}"
            );
            self.acknowledged[n] = found;
            self.since[n].clear();
        }
        assert_eq!(backend.malformed(), 0, "{what}");
    }
}

/// Opens and writes one file three times, each time until a power cut at a random moment, also during creation and
/// recovery.
fn three_lives(seed: u64, sync: RedbSync) {
    let what = format!("seed {seed}, {sync:?}");
    let mut random = Random(seed);
    let mut expected = Expected::default();
    let mut disk = Platter::new(None);
    for life in 0..3 {
        let most = if random.below(2) == 0 { 40 } else { 600 };
        let power = random.below(most);
        disk = disk.after_power_cut(&mut random, Some(power));
        match disk.open(sync) {
            Ok(backend) => {
                expected.check(&backend, &what);
                let worked = expected.work(&backend, 60, &mut random);
                drop(backend);
                assert!(worked.is_err() || disk.operations() <= power, "{what}");
            }
            Err(error) => {
                let no_power = matches!(&error, OpenError::Io { source, .. } if source.to_string() == "there is no power");
                assert!(no_power, "{what}, life {life}: {error:?}");
            }
        }
    }
    let disk = disk.after_power_cut(&mut random, None);
    let backend = disk.open(sync);
    let backend = backend.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    expected.check(&backend, &what);
    expected
        .work(&backend, 5, &mut random)
        .expect("there is power");
    drop(backend);
    expected.check(&disk.open(sync).expect("it was closed"), &what);
}

#[test]
fn a_power_cut_costs_nothing_that_was_flushed_and_the_file_always_opens() {
    for seed in 0..80 {
        three_lives(seed, RedbSync::Group);
        three_lives(seed, RedbSync::Eventual);
    }
}

/// The file is then empty, unfinished or complete.
#[test]
fn a_power_cut_at_any_moment_of_the_creation_leaves_a_file_that_opens() {
    let whole = Platter::new(None);
    drop(whole.open(RedbSync::Group).expect("there is power"));
    for power in 0..whole.operations() {
        for seed in 0..20 {
            let disk = Platter::new(Some(power));
            let _ = disk.open(RedbSync::Group);
            let disk = disk.after_power_cut(&mut Random(seed), None);
            let backend = disk.open(RedbSync::Group);
            let backend = backend.unwrap_or_else(|error| panic!("{power}, {seed}: {error:?}"));
            backend
                .write(&[Write::Put(key(1), record(1))])
                .expect("there is power");
        }
    }
}

/// redb refuses to work on a file after the first failure; the backend opens it again.
#[test]
fn a_disk_that_was_full_for_a_while_is_used_again_by_itself() {
    for sync in [RedbSync::Group, RedbSync::Eventual] {
        let disk = Platter::new(None);
        let backend = disk.open(sync).expect("there is power");
        let write = |from: u64| {
            let writes: Vec<_> = (0..KEYS)
                .map(|n| Write::Put(key(n), record(from + n as u64)))
                .collect();
            backend.write(&writes).and_then(|_| backend.flush())
        };
        let found = |n: usize| {
            backend
                .get(&key(n))
                .map(|found| found.as_ref().map(span_of))
        };
        write(1).expect("there is room");
        disk.set_room(false);
        for _ in 0..3 {
            let error = write(1_000).expect_err("there is no room");
            assert!(
                error.to_string().contains("lost") || error.to_string().contains("file"),
                "{error}"
            );
        }
        disk.set_room(true);
        let after = found(7).expect("the file was opened again");
        assert!(
            after == Some(8) || after == Some(1_007),
            "{sync:?}: {after:?}"
        );
        write(2_000).expect("there is room");
        assert_eq!(found(7).expect("there is room"), Some(2_007));
        drop(backend);
        let backend = disk.open(sync).expect("there is power");
        let found = backend.get(&key(7)).expect("there is power");
        assert_eq!(found.as_ref().map(span_of), Some(2_007));
    }
}

/// Writes from while it was full, or from before and not synced, are in the file once a flush succeeds.
#[test]
fn a_full_disk_costs_no_write_that_was_answered() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let disk = Platter::new(None);
        let backend = disk.open(RedbSync::Eventual).expect("there is power");
        let mut expected: [Option<u64>; KEYS] = [None; KEYS];
        let mut refused = 0;
        for round in 1..40 {
            disk.set_room(random.below(3) > 0);
            let n = random.below(KEYS);
            let (write, after) = match random.below(4) {
                0 => (Write::Remove(key(n)), None),
                _ => (Write::Put(key(n), record(round)), Some(round)),
            };
            match backend.write(&[write]) {
                Ok(_) => expected[n] = after,
                Err(_) => refused += 1,
            }
            if random.below(4) == 0 {
                let _ = backend.flush();
            }
            disk.set_room(true);
            let n = random.below(KEYS);
            let found = backend.get(&key(n)).expect("there is room");
            assert_eq!(found.as_ref().map(span_of), expected[n], "seed {seed}");
        }
        assert!(refused < 39, "seed {seed}: no write was answered");
        backend.flush().expect("there is room");
        let disk = disk.after_power_cut(&mut random, None);
        let backend = disk.open(RedbSync::Eventual).expect("there is power");
        for (n, expected) in expected.iter().enumerate() {
            let found = backend.get(&key(n)).expect("there is power");
            assert_eq!(
                found.as_ref().map(span_of),
                *expected,
                "seed {seed}, key {n}"
            );
        }
    }
}

/// redb panics on some changes of an open file.
#[test]
fn a_file_that_is_damaged_while_it_is_open_is_an_error_and_no_panic() {
    for seed in 0..25 {
        let mut random = Random(seed);
        let disk = Platter::new(None);
        let backend = disk.open(RedbSync::Group).expect("there is power");
        let writes: Vec<_> = (0..2_000_u64)
            .map(|n| Write::Put(format!("order {n}"), record(n + 1)))
            .collect();
        backend.write(&writes).expect("there is power");
        // The cache of this one is sound, so another one has to read the file.
        drop(backend);
        let backend = disk.open(RedbSync::Group).expect("it was closed");
        {
            let mut state = disk.state();
            let len = state.seen.len();
            let from = random.below(len);
            let to = len.min(from + 1 + random.below(64 * 1024));
            let byte = random.next() as u8;
            state.seen[from..to].fill(byte);
        }
        for n in 0..20 {
            let key = format!("order {}", random.below(2_000));
            let _ = backend.get(&key);
            let _ = backend.write(&[Write::Put(key, record(n + 1))]);
            let _ = backend.scan(&mut |_, _| {});
            let _ = backend.flush();
        }
    }
}
