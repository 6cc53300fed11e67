//! Hostile inputs: each target is a function of bytes, run on its seeds and on some thousands of changes of them.
//!
//! The inputs are the same each time. `FUZZ_INPUTS` multiplies their number, and `FUZZ_SEED` changes them. `scripts/fuzz` gives the
//! same functions to libFuzzer, by way of `fuzz/`.

mod headers;
mod span_program;

#[cfg(feature = "redis")]
mod fake_redis;
#[cfg(feature = "redb")]
mod redb_file;
#[cfg(feature = "redis")]
mod redis_replies;
#[cfg(feature = "redis")]
mod stored;
#[cfg(feature = "redis")]
mod values;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use crate::support::*;

/// Parts of inputs that mutations of single bytes hardly make.
const WORDS: [&[u8]; 20] = [
    b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    b"00000000000000000000000000000000",
    b"-",
    b",",
    b"=",
    b"@",
    b"\n",
    b"\r\n",
    b"\t ",
    b"*3\r\n",
    b"$-1\r\n",
    b":9223372036854775807\r\n",
    b"-OOM command not allowed\r\n",
    b"\"run_id\":",
    b"\"expires_at\":4e9",
    b"\"root\":{\"span_id\":\"b7ad6b7169203331\",\"name\":\"a\",\"started_at\":1}",
    b"null",
    b"{}",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\0",
];

/// Runs a target on its seeds, and on so many changes of them.
fn run(target: &str, inputs: usize, run: fn(&[u8])) {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|it| it.parse::<u64>().ok())
    };
    let inputs = inputs * number("FUZZ_INPUTS").unwrap_or(1) as usize;
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/seeds")
        .join(target);
    let mut seeds: Vec<_> = fs::read_dir(seeds)
        .expect("seeds")
        .map(|seed| seed.expect("a file").path())
        .collect();
    seeds.sort();
    let seeds: Vec<_> = seeds
        .iter()
        .map(|seed| fs::read(seed).expect("a file"))
        .collect();
    assert!(seeds.len() > 2, "{target} has seeds");

    let mut random = Random::new(number("FUZZ_SEED").unwrap_or(1));
    let changed = (0..inputs).map(|_| change(&mut random, &seeds));
    for input in seeds.iter().cloned().chain(changed) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&input))) {
            eprintln!("{target}: {:?}", input.escape_ascii().to_string());
            resume_unwind(panic);
        }
    }
}

/// Changes a seed in a few places.
fn change(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(6) {
        let at = random.below(input.len() + 1);
        let end = (at + random.below(16)).min(input.len());
        match random.below(8) {
            0 | 1 => drop(input.get_mut(at).map(|byte| *byte = random.next() as u8)),
            2 => drop(input.get_mut(at).map(|byte| *byte ^= 1 << random.below(8))),
            3 => input.insert(at, random.next() as u8),
            4 => drop(input.drain(at..end)),
            5 => input = [&input[..end], &input[at..]].concat(),
            6 => {
                let word = WORDS[random.below(WORDS.len())];
                input.splice(at..at, word.iter().copied());
            }
            _ => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(16 * 1024);
    input
}

#[test]
fn a_traceparent_is_read_as_a_second_reader_does() {
    run("traceparent", 20_000, headers::traceparent);
}

#[test]
fn a_tracestate_is_read_as_a_second_reader_does() {
    run("tracestate", 4_000, headers::tracestate);
}

#[test]
fn a_program_of_spans_leaves_no_span_and_no_trace_behind() {
    run("span_program", 1_500, span_program::span_program);
}

#[cfg(feature = "redis")]
#[test]
fn a_binary_value_is_read_as_a_second_reader_does() {
    run("binary", 8_000, stored::stored);
}

#[cfg(feature = "redis")]
#[test]
fn a_json_value_is_read_as_a_second_reader_does() {
    run("json", 8_000, stored::stored);
}

#[cfg(feature = "redis")]
#[test]
fn no_reply_of_a_server_does_harm() {
    run("redis_replies", 1_000, redis_replies::redis_replies);
}

#[cfg(feature = "redb")]
#[test]
fn no_damaged_file_does_harm() {
    run("redb_file", 300, redb_file::redb_file);
}
