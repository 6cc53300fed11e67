#![no_main]

#[path = "../../tests/it/fuzzed"]
mod fuzzed {
    pub(crate) mod headers;
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::headers::tracestate(data));
