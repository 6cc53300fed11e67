//! Rounds by turns, and what is told of them: a table for people, lines of CSV for the plots.
//!
//! All that are compared run once a round, one after the other, so that what else the machine does weighs on each
//! alike. A ratio is the median of the ratios within the rounds.

#![allow(dead_code, reason = "not every bench needs all of it")]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

/// The first line of a file of results.
const COLUMNS: &str = "bench,case,size,threads,subject,unit,median,best,ratio";

pub(crate) struct Bench {
    name: &'static str,
    arguments: Vec<String>,
    csv: Option<File>,
}

/// What is measured. The size and the threads are of what it is measured on, where that has any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) what: &'a str,
    pub(crate) size: usize,
    pub(crate) threads: usize,
}

/// One of those that are compared, with a value for each round.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) rounds: Vec<f64>,
}

impl Bench {
    /// `--csv <file>` has the results appended to that file; what is no option names the cases to be run.
    pub(crate) fn from_arguments(name: &'static str) -> Self {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        let mut bench = Self {
            name,
            arguments,
            csv: None,
        };
        bench.csv = bench.option("--csv").map(|path| open(Path::new(path)));
        bench
    }

    /// Whether it is to be shown only that it works: `cargo test --benches`, or `-- --test`.
    pub(crate) fn is_test(&self) -> bool {
        let has = |flag| self.arguments.iter().any(|argument| argument == flag);
        has("--test") || !has("--bench")
    }

    pub(crate) fn unless_test<T>(&self, value: T, in_test: T) -> T {
        if self.is_test() { in_test } else { value }
    }

    /// The value of an option such as `--csv`.
    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        let at = self.arguments.iter().position(|arg| arg == name)?;
        self.arguments.get(at + 1).map(String::as_str)
    }

    pub(crate) fn wants(&self, case: &str) -> bool {
        let mut wanted = Vec::new();
        let mut arguments = self.arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--bench" | "--test" => {}
                option if option.starts_with("--") => drop(arguments.next()),
                name => wanted.push(name),
            }
        }
        wanted.is_empty() || wanted.iter().any(|wanted| case.contains(wanted))
    }

    /// Tells of the subjects beside the one that they are compared with.
    pub(crate) fn tell(&mut self, case: Case<'_>, unit: &str, beside: &str, subjects: &[Subject]) {
        let Case {
            what,
            size,
            threads,
        } = case;
        if self.is_test() {
            return;
        }
        let of = if size > 0 {
            format!(", of {size}")
        } else {
            String::new()
        };
        let on = if threads > 1 {
            format!(", {threads} threads")
        } else {
            String::new()
        };
        println!("{}: {what}{of}{on}", self.name);
        let baseline = subjects.iter().find(|subject| subject.name == beside);
        for subject in subjects {
            let (median, best) = (median(subject.rounds.clone()), subject.best());
            let ratio = baseline.map(|baseline| {
                let rounds = subject.rounds.iter().zip(&baseline.rounds);
                self::median(rounds.map(|(own, theirs)| own / theirs).collect())
            });
            let compared = ratio.map_or(String::new(), |ratio| format!("{ratio:>8.3} of {beside}"));
            println!(
                "  {:<24}{median:>12.1} {unit}, at best {best:>12.1}{compared}",
                subject.name
            );
            if let Some(csv) = &mut self.csv {
                let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.4}"));
                assert!(!subject.name.contains(','), "fields are not quoted");
                let line = format!(
                    "{},{what},{size},{threads},{},{unit},{median:.2},{best:.2},{ratio}",
                    self.name, subject.name
                );
                writeln!(csv, "{line}").expect("the file takes a line");
            }
        }
    }
}

impl Subject {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            rounds: Vec::new(),
        }
    }

    pub(crate) fn best(&self) -> f64 {
        self.rounds.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// Runs each of them once a round, and each round begins with another one: who follows whom must not matter.
pub(crate) fn by_turns<S>(
    rounds: usize,
    subjects: &mut [S],
    name: impl Fn(&S) -> String,
    mut run: impl FnMut(&mut S) -> f64,
) -> Vec<Subject> {
    let mut measured: Vec<_> = subjects.iter().map(|s| Subject::new(name(s))).collect();
    for round in 0..rounds {
        for turn in 0..subjects.len() {
            let at = (round + turn) % subjects.len();
            let value = run(&mut subjects[at]);
            measured[at].rounds.push(value);
        }
    }
    measured
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn open(path: &Path) -> File {
    let file = OpenOptions::new().append(true).create(true).open(path);
    let mut file = file.expect("the file for the results can be written");
    if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
        writeln!(file, "{COLUMNS}").expect("the file takes a line");
    }
    file
}
