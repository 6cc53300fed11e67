//! The crate's own reader and writer of values: through a server in the tests, as users have them, and without one in
//! `fuzz/`, which is about a hundred times as fast.

use tracing_workflow_context::Form;
use tracing_workflow_context::backend::Record;

#[cfg(not(fuzzing))]
use {
    super::fake_redis::FakeRedis,
    std::sync::{Mutex, OnceLock},
    std::time::Duration,
    tracing_workflow_context::RedisBackend,
    tracing_workflow_context::backend::{StorageBackend as _, Write},
};

#[cfg(not(fuzzing))]
struct Fixture {
    /// The server has one value: one call at a time.
    one: Mutex<()>,
    server: FakeRedis,
    binary: RedisBackend,
    json: RedisBackend,
}

#[cfg(not(fuzzing))]
fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let server = FakeRedis::start();
        let connect = || {
            let backend = RedisBackend::connect(&server.url()).expect("a sound URL");
            let minute = Duration::from_secs(60);
            backend
                .with_connect_timeout(minute)
                .with_response_timeout(minute)
        };
        let (binary, json) = (connect(), connect().with_form(Form::Json));
        Fixture {
            one: Mutex::new(()),
            server,
            binary,
            json,
        }
    })
}

/// Returns `None` for a malformed value, and `Some(None)` for one that has expired.
#[cfg(not(fuzzing))]
pub(super) fn read(value: &[u8]) -> Option<Option<Record>> {
    let fixture = fixture();
    let _one = fixture.one.lock();
    let backend = &fixture.binary;
    fixture.server.set_value(value);
    let malformed = backend.malformed();
    let found = backend.get("id").expect("the server answers");
    let is_malformed = backend.malformed() > malformed;
    assert!(!is_malformed || found.is_none());
    (!is_malformed).then_some(found)
}

#[cfg(fuzzing)]
pub(super) fn read(value: &[u8]) -> Option<Option<Record>> {
    let record = Form::decode_value(value)?;
    let has_expired = record.expires_at <= std::time::SystemTime::now();
    Some((!has_expired).then_some(record))
}

#[cfg(not(fuzzing))]
pub(super) fn write(form: Form, record: &Record) -> Vec<u8> {
    let fixture = fixture();
    let _one = fixture.one.lock();
    let backend = match form {
        Form::Json => &fixture.json,
        _ => &fixture.binary,
    };
    let put = Write::Put("id".to_owned(), record.clone());
    backend.write(&[put]).expect("the server answers");
    fixture.server.value()
}

#[cfg(fuzzing)]
pub(super) fn write(form: Form, record: &Record) -> Vec<u8> {
    form.encode_value("id", record)
}
