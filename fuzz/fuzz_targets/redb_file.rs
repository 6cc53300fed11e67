#![no_main]

#[path = "../../tests/it/fuzzed/redb_file.rs"]
mod redb_file;

libfuzzer_sys::fuzz_target!(|data: &[u8]| redb_file::redb_file(data));
