#![no_main]

#[path = "../../tests/it/fuzzed/fake_redis.rs"]
#[allow(dead_code, reason = "the other target uses the rest")]
mod fake_redis;
#[path = "../../tests/it/fuzzed/redis_replies.rs"]
mod redis_replies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| redis_replies::redis_replies(data));
