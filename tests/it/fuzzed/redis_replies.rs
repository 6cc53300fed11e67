//! Replies of a server that are no replies of Redis, or not those to what was asked.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use tracing_workflow_context::backend::{Record, StorageBackend as _, Write};
use tracing_workflow_context::{RedisBackend, WorkflowContext};

use super::fake_redis::FakeRedis;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// The input is what the server says, whatever it is asked, before it closes the connection.
pub(crate) fn redis_replies(data: &[u8]) {
    static SERVER: OnceLock<(FakeRedis, RedisBackend)> = OnceLock::new();
    let (server, backend) = SERVER.get_or_init(|| {
        let server = FakeRedis::start();
        let backend = RedisBackend::connect(&server.url()).expect("a sound URL");
        let minute = Duration::from_secs(60);
        let backend = backend
            .with_connect_timeout(minute)
            .with_response_timeout(minute);
        (server, backend)
    });
    server.say(data);
    let context = WorkflowContext::parse(PARENT, "").expect("well formed");
    let record = Record::new(context, SystemTime::now() + Duration::from_secs(3600));
    let _ = backend.flush();
    if let Ok(Some(found)) = backend.get("id") {
        // Nothing is made up: some bytes that came were a record.
        assert!(data.len() > 40, "{found:?}");
    }
    let writes = [
        Write::PutIfAbsent("id".to_owned(), record.clone()),
        Write::Put("id".to_owned(), record),
        Write::Remove("other".to_owned()),
    ];
    if let Ok(outcomes) = backend.write(&writes) {
        assert_eq!(outcomes.len(), writes.len());
    }
    let mut visited = 0;
    let _ = backend.scan(&mut |_, _| visited += 1);
    assert!(visited <= data.len());
}
