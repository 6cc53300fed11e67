#![no_main]

#[path = "../../tests/it/fuzzed/fake_redis.rs"]
#[allow(dead_code, reason = "the other target uses the rest")]
mod fake_redis;
#[path = "../../tests/it/fuzzed/headers.rs"]
#[allow(dead_code, reason = "the other target uses the rest")]
mod headers;
#[path = "../../tests/it/fuzzed/stored.rs"]
mod stored;

libfuzzer_sys::fuzz_target!(|data: &[u8]| stored::stored(data));
