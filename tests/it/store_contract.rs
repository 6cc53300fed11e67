//! Every backend fulfils the contract of `StorageBackend`, and the contract suite detects each violation.

use crate::support::*;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, RwLock};
use std::thread;
use std::time::{Duration, SystemTime};

use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};
use tracing_workflow_context::testing::check_backend;
use tracing_workflow_context::{MemoryBackend, WorkflowContext};

#[test]
fn memory_fulfils_the_contract() {
    check_backend(MemoryBackend::new);
}

#[cfg(feature = "redb")]
#[test]
fn redb_fulfils_the_contract() {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use tracing_workflow_context::{RedbBackend, RedbSync};

    for sync in [RedbSync::Group, RedbSync::TwoPhase, RedbSync::Eventual] {
        let (directory, files) = (Directory::new(), AtomicUsize::new(0));
        let next = || directory.file(&files.fetch_add(1, Relaxed).to_string());
        check_backend(|| RedbBackend::open_with(next(), sync).unwrap());
    }
}

#[test]
fn a_correct_backend_passes() {
    check_backend(|| Broken::new(Fault::None));
}

#[test]
fn each_broken_rule_is_named() {
    let broken = [
        (Fault::IsNotEmpty, "`make` returns an empty backend"),
        (
            Fault::AnswersTooLittle,
            "`write` returns one outcome for each write",
        ),
        (
            Fault::AnswersForPuts,
            "`write` returns `Existing` for a `PutIfAbsent` only",
        ),
        (
            Fault::AnswersInReverse,
            "the outcomes are in the order of their writes",
        ),
        (Fault::KeepsTheFirstPut, "`Put` replaces any other record"),
        (
            Fault::PutsWhatIsNotAbsent,
            "`PutIfAbsent` returns the existing record and leaves it unchanged",
        ),
        (
            Fault::NamesTheLoser,
            "`PutIfAbsent` returns the existing record and leaves it unchanged",
        ),
        (
            Fault::NamesNobody,
            "`PutIfAbsent` returns the existing record and leaves it unchanged",
        ),
        (
            Fault::RemovesNothing,
            "`Remove` removes the record of its key and no other",
        ),
        (
            Fault::RemovesByPrefix,
            "any text of 1 to 4095 bytes is a key",
        ),
        (
            Fault::ExpiresNothing,
            "`Expire` changes the expiry and nothing else",
        ),
        (
            Fault::ExpireBringsBack,
            "`Expire` does not bring back an expired record",
        ),
        (
            Fault::RemovesLast,
            "take effect in their order for each key",
        ),
        (
            Fault::RefusesLargeGroups,
            "`write` must succeed while the backend is checked",
        ),
        (Fault::IgnoresCase, "any text of 1 to 4095 bytes is a key"),
        (
            Fault::CutsKeys(1024),
            "any text of 1 to 4095 bytes is a key",
        ),
        (
            Fault::CutsKeys(4094),
            "any text of 1 to 4095 bytes is a key",
        ),
        (
            Fault::EndsKeysAt('\0'),
            "any text of 1 to 4095 bytes is a key",
        ),
        (
            Fault::EndsKeysAt('\u{1f}'),
            "any text of 1 to 4095 bytes is a key",
        ),
        (
            Fault::EndsKeysAt('}'),
            "any text of 1 to 4095 bytes is a key",
        ),
        (
            Fault::LosesTraceState,
            "a record comes back as it was stored",
        ),
        (Fault::LosesRunId, "a record comes back as it was stored"),
        (
            Fault::LosesGeneration,
            "a record comes back as it was stored",
        ),
        (Fault::LosesExpiry, "`Put` replaces any other record"),
        (Fault::GetShowsWhatIsOver, "with a past time ends a record"),
        (Fault::ScanShowsWhatIsOver, "with a past time ends a record"),
        (Fault::EndsEarly, "a record exists until its `expires_at`"),
        (
            Fault::WhatIsOverWins,
            "`PutIfAbsent` stores its record over an expired one",
        ),
        (Fault::ScansAtMost(1000), "`scan` visits every record once"),
        (Fault::ScansSomeTwice, "`scan` visits every record once"),
        (
            Fault::ScansUnderItsLock,
            "`scan` holds no lock while `visit` runs",
        ),
        (
            Fault::DecidesWithoutALock,
            "of concurrent `PutIfAbsent`s on one key one stores its record",
        ),
        (Fault::FlushLosesAll, "`flush` loses nothing"),
        (
            Fault::FlushFails,
            "`flush` must succeed while the backend is checked",
        ),
        (
            Fault::CountsMalformed,
            "`malformed` counts values that could not be decoded, and nothing else",
        ),
    ];
    let find = |(fault, rule): &(Fault, &str)| {
        let check = || check_backend(|| Broken::new(*fault));
        let Err(panic) = catch_unwind(AssertUnwindSafe(check)) else {
            return Some(format!("{fault:?} was not found"));
        };
        let message = panic.downcast_ref::<String>().expect("a sentence");
        let begins = message.starts_with("this backend breaks the contract of StorageBackend: ");
        (!begins || !message.contains(rule)).then(|| format!("{fault:?} is called: {message}"))
    };
    let (shares, size) = (8, broken.len().div_ceil(8));
    let wrong = at_once(shares, |share| {
        let mine = broken.iter().skip(share * size).take(size);
        mine.filter_map(find).collect::<Vec<_>>()
    });
    let wrong = wrong.concat();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One way to break the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    IsNotEmpty,
    AnswersTooLittle,
    AnswersForPuts,
    AnswersInReverse,
    KeepsTheFirstPut,
    PutsWhatIsNotAbsent,
    NamesTheLoser,
    NamesNobody,
    RemovesNothing,
    RemovesByPrefix,
    ExpiresNothing,
    ExpireBringsBack,
    RemovesLast,
    RefusesLargeGroups,
    IgnoresCase,
    CutsKeys(usize),
    EndsKeysAt(char),
    LosesTraceState,
    LosesRunId,
    LosesGeneration,
    LosesExpiry,
    GetShowsWhatIsOver,
    ScanShowsWhatIsOver,
    EndsEarly,
    WhatIsOverWins,
    ScansAtMost(usize),
    ScansSomeTwice,
    ScansUnderItsLock,
    DecidesWithoutALock,
    FlushLosesAll,
    FlushFails,
    CountsMalformed,
}

#[derive(Debug)]
struct Broken {
    fault: Fault,
    /// The records, each with its original key, by the key under which it is kept.
    records: RwLock<HashMap<String, (String, Record)>>,
    /// Held while deciding, if decisions are atomic.
    deciding: Mutex<()>,
}

impl Broken {
    fn new(fault: Fault) -> Self {
        let broken = Self {
            fault,
            records: RwLock::default(),
            deciding: Mutex::default(),
        };
        if fault == Fault::IsNotEmpty {
            broken.put("left over", record());
        }
        broken
    }

    fn kept_key(&self, key: &str) -> String {
        match self.fault {
            Fault::IgnoresCase => key.to_lowercase(),
            Fault::CutsKeys(most) => key.chars().take(most).collect(),
            Fault::EndsKeysAt(end) => key.split(end).next().unwrap_or_default().to_owned(),
            _ => key.to_owned(),
        }
    }

    fn kept_record(&self, mut record: Record) -> Record {
        match self.fault {
            // Parsing sets `recorded_at` anew, which must not be noticed first.
            Fault::LosesTraceState if record.context.tracestate().is_empty() => {}
            Fault::LosesTraceState => {
                let traceparent = record.context.traceparent();
                record.context = WorkflowContext::parse(&traceparent, "").unwrap();
            }
            Fault::LosesRunId => record.run_id = None,
            Fault::LosesGeneration => record.generation = 1,
            Fault::LosesExpiry => record.expires_at = SystemTime::now() + Duration::from_secs(60),
            _ => {}
        }
        record
    }

    fn put(&self, key: &str, record: Record) {
        let kept = (key.to_owned(), self.kept_record(record));
        self.records
            .write()
            .unwrap()
            .insert(self.kept_key(key), kept);
    }

    fn there(&self, key: &str) -> Option<Record> {
        let records = self.records.read().unwrap();
        records
            .get(&self.kept_key(key))
            .map(|(_, record)| record.clone())
    }

    fn is_live(&self, record: &Record) -> bool {
        let early = match self.fault {
            Fault::EndsEarly => Duration::from_secs(60),
            _ => Duration::ZERO,
        };
        record.expires_at > SystemTime::now() + early
    }

    fn write_one(&self, write: &Write) -> Option<Record> {
        let _deciding = match self.fault {
            Fault::DecidesWithoutALock => None,
            _ => Some(self.deciding.lock().unwrap()),
        };
        let key = write.key();
        let there = self.there(key);
        let live = there.clone().filter(|record| self.is_live(record));
        match write {
            Write::PutIfAbsent(_, new) => {
                let winner = match self.fault {
                    Fault::WhatIsOverWins => there,
                    _ => live,
                };
                if self.fault == Fault::DecidesWithoutALock {
                    thread::sleep(Duration::from_micros(200));
                }
                if winner.is_none() || self.fault == Fault::PutsWhatIsNotAbsent {
                    self.put(key, new.clone());
                }
                match self.fault {
                    Fault::NamesNobody => None,
                    Fault::NamesTheLoser => winner.map(|_| new.clone()),
                    _ => winner,
                }
            }
            Write::Put(_, new) => {
                if live.is_none() || self.fault != Fault::KeepsTheFirstPut {
                    self.put(key, new.clone());
                }
                live.filter(|_| self.fault == Fault::AnswersForPuts)
            }
            Write::Expire(_, at) => {
                let moved = match self.fault {
                    Fault::ExpiresNothing => None,
                    Fault::ExpireBringsBack => there,
                    _ => live,
                };
                if let Some(mut record) = moved {
                    record.expires_at = *at;
                    self.put(key, record);
                }
                None
            }
            Write::Remove(_) => {
                let key = self.kept_key(key);
                let goes = |kept: &String| match self.fault {
                    Fault::RemovesNothing => false,
                    Fault::RemovesByPrefix => kept.starts_with(&key),
                    _ => *kept == key,
                };
                self.records.write().unwrap().retain(|kept, _| !goes(kept));
                None
            }
            _ => unreachable!("there is no other write"),
        }
    }
}

impl StorageBackend for Broken {
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        if self.fault == Fault::RefusesLargeGroups && writes.len() > 1000 {
            return Err(BackendError::new("too many", None));
        }
        let comes_last =
            |write: &Write| matches!(write, Write::Remove(_)) && self.fault == Fault::RemovesLast;
        let mut answers = vec![None; writes.len()];
        for last in [false, true] {
            for (write, answer) in writes
                .iter()
                .zip(&mut answers)
                .filter(|(write, _)| comes_last(write) == last)
            {
                *answer = self.write_one(write);
            }
        }
        match self.fault {
            Fault::AnswersTooLittle => answers.retain(Option::is_some),
            Fault::AnswersInReverse => answers.reverse(),
            _ => {}
        }
        let outcome = |found: Option<_>| found.map_or(WriteOutcome::Done, WriteOutcome::Existing);
        Ok(answers.into_iter().map(outcome).collect())
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let shows =
            |record: &Record| self.fault == Fault::GetShowsWhatIsOver || self.is_live(record);
        Ok(self.there(key).filter(shows))
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let shows =
            |record: &Record| self.fault == Fault::ScanShowsWhatIsOver || self.is_live(record);
        let records = self.records.read().unwrap();
        let most = match self.fault {
            Fault::ScansAtMost(most) => most,
            _ => usize::MAX,
        };
        let shown = records
            .values()
            .filter(|(_, record)| shows(record))
            .take(most)
            .cloned();
        let mut shown: Vec<_> = shown.collect();
        if self.fault == Fault::ScansSomeTwice && shown.len() > 1000 {
            shown.extend_from_within(..1);
        }
        let _held = match self.fault {
            Fault::ScansUnderItsLock => Some(records),
            _ => {
                drop(records);
                None
            }
        };
        shown
            .into_iter()
            .for_each(|(key, record)| visit(&key, record));
        Ok(())
    }

    fn flush(&self) -> Result<(), BackendError> {
        match self.fault {
            Fault::FlushLosesAll => self.records.write().unwrap().clear(),
            Fault::FlushFails => return Err(BackendError::new("no", None)),
            _ => {}
        }
        Ok(())
    }

    fn malformed(&self) -> u64 {
        u64::from(self.fault == Fault::CountsMalformed)
    }
}

fn record() -> Record {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let context = WorkflowContext::parse(parent, "").unwrap();
    record_of(context)
}
