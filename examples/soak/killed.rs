//! Processes that are killed with SIGKILL at any moment. What a flush has answered `Ok` for has to be there afterwards.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use tracing_workflow_context::backend::StorageBackend;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

use super::store::{self, NONE, Switched, is_file};
use super::{Random, Result};

/// Records of one file, before a new one is begun: to check it takes as long as it has records.
const KILLS_OF_ONE_FILE: u64 = 20;

fn id_of(number: u64) -> String {
    format!("order-{number:012}")
}

fn context(number: u64) -> Result<WorkflowContext> {
    Ok(WorkflowContext::parse(
        &format!("00-{number:032x}-{number:016x}-01"),
        "",
    )?)
}

/// Stores one instance after the other, and says after each flush up to which number all are flushed.
pub(crate) fn work(store: &str, from: u64) -> Result<()> {
    let backend = Switched {
        inner: store::open(store)?,
        outage: std::sync::Arc::new(NONE.into()),
    };
    let storage = WorkflowContextStorage::builder().backend(backend).build()?;
    let mut random = Random(from);
    let mut number = from;
    loop {
        for _ in 0..1 + random.below(40) {
            number += 1;
            storage.store(&id_of(number), context(number)?)?;
        }
        if storage.flush().is_ok() {
            // One system call, so that the line is whole or missing.
            let line = format!("flushed {number}\n");
            std::io::stdout().write_all(line.as_bytes())?;
            std::io::stdout().flush()?;
        }
    }
}

/// Kills such a worker so many times, and looks for all records after each time.
pub(crate) fn kill(store: &str, times: u64) -> Result<()> {
    let start = Instant::now();
    let seed = env::var("KILL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| std::process::id().into());
    let mut random = Random(seed);
    println!("KILL_SEED={seed}");
    let (mut flushed, mut early, mut records, mut file) = (0, 0, 0, String::new());
    for kill in 0..times {
        if kill % KILLS_OF_ONE_FILE == 0 && is_file(store) {
            let _ = std::fs::remove_file(&file);
            file = format!("{store}-{kill}");
            records += flushed;
            flushed = 0;
        }
        let store = if is_file(store) { &file } else { store };
        let from = flushed;
        let mut worker = Command::new(env::current_exe()?)
            .args(["work", store, &from.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = BufReader::new(worker.stdout.take().ok_or("piped above")?);
        let mut first = String::new();
        // Half of them may be killed while they open the store.
        if kill % 2 == 0 {
            said.read_line(&mut first)?;
        }
        let most = [10_000, 50_000, 200_000][random.below(3)];
        thread::sleep(Duration::from_micros(random.below(most) as u64));
        worker.kill()?;
        worker.wait()?;
        let mut all = first;
        said.read_to_string(&mut all)?;
        let last = all
            .lines()
            .filter_map(|line| line.strip_prefix("flushed "))
            .next_back();
        early += u64::from(last.is_none());
        flushed = last.map_or(Ok(flushed), str::parse)?;
        // On a server, what earlier workers wrote was looked for after them.
        let from = if is_file(store) { 0 } else { from };
        look_for(&*store::open(store)?, from + 1..=flushed)
            .map_err(|error| format!("kill {kill}: {error}"))?;
    }
    let _ = std::fs::remove_file(&file);
    println!(
        "{times} kills in {:.0} s, {early} of them before the first flush: all {} records that were flushed are there",
        start.elapsed().as_secs_f64(),
        records + flushed
    );
    Ok(())
}

/// Looks for all records up to that number.
pub(crate) fn check(store: &str, up_to: u64) -> Result<()> {
    look_for(&*store::open(store)?, 1..=up_to)
}

fn look_for(backend: &dyn StorageBackend, numbers: std::ops::RangeInclusive<u64>) -> Result<()> {
    for number in numbers {
        let found = backend.get(&id_of(number))?;
        let found = found.map(|record| record.context.span_id());
        if found != Some(context(number)?.span_id()) {
            return Err(format!("{} was flushed, and {found:?} is there", id_of(number)).into());
        }
    }
    Ok(())
}
