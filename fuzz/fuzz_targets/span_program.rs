#![no_main]

#[allow(dead_code, reason = "the other target uses the rest")]
#[path = "../../tests/it/fuzzed/headers.rs"]
mod headers;
#[path = "../../tests/it/fuzzed/span_program.rs"]
mod span_program;

libfuzzer_sys::fuzz_target!(|data: &[u8]| span_program::span_program(data));
