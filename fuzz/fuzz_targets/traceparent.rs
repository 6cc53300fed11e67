#![no_main]

#[allow(dead_code, reason = "the other target uses the rest")]
#[path = "../../tests/it/fuzzed/headers.rs"]
mod headers;

libfuzzer_sys::fuzz_target!(|data: &[u8]| headers::traceparent(data));
