#![no_main]

#[path = "../../tests/it/fuzzed"]
mod fuzzed {
    mod fake_redis;
    pub(crate) mod redis_replies;
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::redis_replies::redis_replies(data));
