//! What one span costs from its creation to its close, rung by rung; with more instances; on more threads. Spans are
//! exported to nobody.
//!
//! `cargo bench --bench layer [-- [--csv <file>] [<case>...]]`, the cases being `ladder`, `instances`, `threads`, and `hot`: one
//! instance for all threads.

#![allow(clippy::print_stdout, reason = "the terminal is where the numbers go")]

#[path = "support/ladder.rs"]
mod ladder;
#[path = "support/report.rs"]
mod report;

use std::time::Instant;

use ladder::{INSTANCES, Rung, Stage};
use report::{Bench, Case, by_turns};

/// Spans of a round.
const SPANS: usize = 10_000;

const ROUNDS: usize = 25;

fn main() {
    let mut bench = Bench::from_arguments("layer");
    let rungs = |names: &[Rung], instances| -> Vec<_> {
        names
            .iter()
            .map(|rung| Stage::new(*rung, instances))
            .collect()
    };
    let (rounds, spans) = bench.unless_test((ROUNDS, SPANS), (1, 100));
    let one = |stage: &mut Stage| {
        let mut nanoseconds = 0.0;
        stage.measure(|life| {
            let start = Instant::now();
            (0..spans).for_each(|_| life());
            nanoseconds = start.elapsed().as_secs_f64() * 1e9 / spans as f64;
        });
        nanoseconds
    };
    if bench.wants("ladder") {
        // What a file costs is for `backends` to tell.
        let all = Rung::ALL.map(|(_, rung)| rung);
        let spans = all.split(|rung| *rung == Rung::Store).next();
        let spans = spans.into_iter().flatten();
        let spans: Vec<_> = spans
            .filter(|rung| **rung != Rung::OursMissRedb)
            .copied()
            .collect();
        let mut stages = rungs(&spans, INSTANCES);
        let results = by_turns(rounds, &mut stages, |s| s.rung.name().into(), one);
        bench.tell(case("ladder", INSTANCES, 1), "ns", "plain-tagged", &results);
    }
    if bench.wants("instances") {
        for size in bench.unless_test(&[1_000, 100_000, 1_000_000][..], &[1_000]) {
            let mut stages = rungs(&[Rung::PlainTagged, Rung::OursHit, Rung::ByHand], *size);
            let results = by_turns(rounds, &mut stages, |s| s.rung.name().into(), one);
            bench.tell(case("instances", *size, 1), "ns", "plain-tagged", &results);
        }
    }
    let untagged = [Rung::PlainUntagged, Rung::OursUntagged];
    let tagged = [Rung::PlainTagged, Rung::OursHit, Rung::ByHand];
    for (what, rungs_of, instances, threads) in [
        ("threads", &untagged[..], INSTANCES, &[1, 2, 8][..]),
        ("threads", &tagged, INSTANCES, &[1, 2, 8]),
        ("hot", &tagged, 1, &[1, 2]),
    ] {
        if !bench.wants(what) {
            continue;
        }
        let mut stages = rungs(rungs_of, instances);
        for threads in threads.iter().copied() {
            let each = (spans * 4 / threads).max(spans);
            let all = (each * threads) as f64;
            let crowd = |stage: &mut Stage| stage.crowd(threads, each) * 1e9 / all;
            let results = by_turns(rounds, &mut stages, |s| s.rung.name().into(), crowd);
            let case = case(what, instances, threads);
            bench.tell(case, "ns", rungs_of[0].name(), &results);
        }
    }
}

fn case(what: &str, size: usize, threads: usize) -> Case<'_> {
    Case {
        what,
        size,
        threads,
    }
}
