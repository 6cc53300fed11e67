//! Long runs of everything that may go wrong: what `scripts/soak` and `scripts/netem` run, with servers of their own.
//!
//! ```text
//! soak run <store> <seconds>              spans at full rate, with outages; each exported span is checked
//! soak kill <store> <times>               worker processes are killed; nothing that was flushed may be missing
//! soak work <store> <from>                such a worker: stores and flushes, and says so, until it is killed
//! soak check <store> <up to>              fails if one of the records up to that number is missing
//! soak history <store> <name> <seconds>   one of several workers on the same instances; prints what it saw
//! soak judge <file>...                    fails if what several workers saw is no history of registers written once
//! ```
//!
//! A store is `memory`, a file, `redis://..` or `postgres://..`.
#![allow(clippy::print_stdout, reason = "it prints its results")]

mod history;
mod killed;
mod load;
mod store;

use std::error::Error;
use std::time::Duration;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let seconds = |text: &str| Ok::<_, Box<dyn Error>>(Duration::from_secs_f64(text.parse()?));
    match args[..] {
        ["run", store, time] => load::run(store, seconds(time)?),
        ["kill", store, times] => killed::kill(store, times.parse()?),
        ["work", store, from] => killed::work(store, from.parse()?),
        ["check", store, up_to] => killed::check(store, up_to.parse()?),
        ["history", store, name, time] => history::work(store, name, seconds(time)?),
        ["judge", ref files @ ..] => history::judge(files),
        _ => Err("see the head of examples/soak/main.rs".into()),
    }
}

/// A SplitMix64 generator.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }
}
