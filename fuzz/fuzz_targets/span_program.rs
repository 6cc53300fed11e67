#![no_main]

#[path = "../../tests/it/fuzzed"]
mod fuzzed {
    mod headers;
    pub(crate) mod span_program;
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::span_program::span_program(data));
