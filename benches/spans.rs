//! Makes a number of spans of one rung and does nothing else, for a profiler to watch; `instructions.sh` does.
#![allow(clippy::print_stdout, reason = "a program to be run by hand")]

#[path = "support/ladder.rs"]
mod ladder;

use ladder::{INSTANCES, Rung, Stage};

fn main() {
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    let rung = |name: &String| Rung::ALL.into_iter().find(|(known, _)| known == name);
    let count = |count: &String| count.parse().ok();
    match (
        arguments.first().and_then(rung),
        arguments.get(1).and_then(count),
    ) {
        (Some((_, rung)), Some(count)) => make(rung, count),
        _ => {
            println!("usage: spans <rung> <count>, with one of the rungs:");
            for (name, rung) in Rung::ALL {
                println!("  {name}");
                let has_file = cfg!(feature = "redb") || !rung.has_file();
                if has_file && (cfg!(feature = "durable-root") || !rung.has_roots()) {
                    make(rung, 10);
                }
            }
        }
    }
}

fn make(rung: Rung, count: u64) {
    Stage::new(rung, INSTANCES).measure(|life| (0..count).for_each(|_| life()));
}
