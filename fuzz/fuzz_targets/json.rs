#![no_main]

#[path = "../../tests/it/fuzzed"]
mod fuzzed {
    mod headers;
    pub(crate) mod stored;
    mod values;
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::stored::stored(data));
