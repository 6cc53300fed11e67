//! Warnings to the global subscriber are rate limited; a binary of its own, because both are process-wide.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use opentelemetry::trace::{Link, SpanBuilder, SpanKind, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue, TraceId};
use opentelemetry_sdk::trace::{SamplingResult, SdkTracerProvider, ShouldSample};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).expect("a log is text")
    }
}

/// Returns the log of this process, which all tests of this file share.
fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false);
        subscriber.with_writer(log.clone()).init();
        log
    })
}

/// Waits for lines with that text, and returns them.
fn logged(text: &str) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let all = log().text();
        let logged: Vec<_> = all.lines().filter(|line| line.contains(text)).collect();
        if !logged.is_empty() {
            // By one name all of them are filtered.
            let is_ours = |line: &&str| line.contains(" WARN tracing-workflow-context: ");
            assert!(logged.iter().all(is_ours), "{logged:?}");
            return logged.into_iter().map(str::to_owned).collect();
        }
        assert!(
            Instant::now() < deadline,
            "nothing was logged with {text}: {all}"
        );
        std::thread::yield_now();
    }
}

#[test]
fn an_oversized_id_is_logged_once_without_control_characters() {
    log();
    let storage = WorkflowContextStorage::new();
    let tracer = storage.tracer(SdkTracerProvider::builder().build().tracer("test"));
    let id = format!("\u{1b}[31m\n{}", "x".repeat(5000));
    let open = || {
        for _ in 0..1000 {
            let tag = KeyValue::new("workflow.instance_id", id.clone());
            drop(tracer.build(SpanBuilder::from_name("step").with_attributes([tag])));
        }
    };
    open();
    logged("exceeds 1024 bytes");
    open();

    let logged = logged("exceeds 1024 bytes");
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert!(
        logged[0].contains(" WARN ") && logged[0].contains("5006 bytes"),
        "{logged:?}"
    );
    assert!(
        !logged[0].contains('\u{1b}') && logged[0].len() < 600,
        "{logged:?}"
    );
    assert_eq!(storage.stats().oversized, 2000);
    assert!(storage.instance_ids().is_empty());
}

#[derive(Debug)]
struct Refusing;

impl Refusing {
    fn error() -> BackendError {
        BackendError::new("the disk is\n\u{1b}[31mfull", None)
    }
}

impl StorageBackend for Refusing {
    fn write(&self, _: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        Err(Self::error())
    }

    fn get(&self, _: &str) -> Result<Option<Record>, BackendError> {
        Err(Self::error())
    }

    fn scan(&self, _: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        Err(Self::error())
    }

    fn flush(&self) -> Result<(), BackendError> {
        Err(Self::error())
    }
}

#[test]
fn a_failing_backend_is_logged_once_without_control_characters() {
    log();
    // A lookup that times out is not logged.
    let storage = WorkflowContextStorage::builder()
        .backend(Refusing)
        .lookup_budget(Duration::from_secs(60));
    let storage = storage.build().expect("valid settings");
    assert_eq!(storage.get("order").expect("fails open"), None);
    logged("the disk is");
    assert_eq!(storage.get("order").expect("fails open"), None);

    let logged = logged("the disk is");
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert!(
        logged[0].contains(" WARN ") && logged[0].contains("full"),
        "{logged:?}"
    );
    assert!(!logged[0].contains('\u{1b}'), "{logged:?}");
    assert!(storage.stats().backend_errors >= 2);
}

#[test]
fn a_trace_that_many_instances_share_is_logged_once_with_the_name_of_its_outermost_span() {
    log();
    let storage = WorkflowContextStorage::new();
    let layer = storage.layer(SdkTracerProvider::builder().build().tracer("test"));
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::with_default(subscriber, || {
        let _worker = tracing::info_span!("poll the queue").entered();
        for number in 0..100 {
            let _task = tracing::info_span!("task").entered();
            tracing::info_span!("step", workflow.instance_id = number).in_scope(|| ());
        }
    });
    let logged = logged("share one trace");
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert!(logged[0].contains("poller_spans") && logged[0].contains("poll the queue"));
    assert_eq!(storage.stats().shared_traces, 1);
}

#[test]
fn a_panic_that_was_caught_is_logged_once() {
    log();
    #[derive(Clone, Debug)]
    struct Panicking;
    impl ShouldSample for Panicking {
        fn should_sample(
            &self,
            _: Option<&Context>,
            _: TraceId,
            _: &str,
            _: &SpanKind,
            _: &[KeyValue],
            _: &[Link],
        ) -> SamplingResult {
            panic!("the sampler's own")
        }
    }
    let provider = SdkTracerProvider::builder().with_sampler(Panicking).build();
    let storage = WorkflowContextStorage::new();
    let subscriber = tracing_subscriber::registry().with(storage.layer(provider.tracer("test")));
    let dispatch = tracing::Dispatch::new(subscriber);
    let open = || {
        tracing::dispatcher::with_default(&dispatch, || {
            (0..10).for_each(|_| tracing::info_span!("step").in_scope(|| ()));
        });
    };
    open();
    logged("panicked when a span was started");
    open();
    assert_eq!(logged("panicked when a span was started").len(), 1);
    assert_eq!(storage.stats().panics, 20);
}

#[cfg(feature = "durable-root")]
#[test]
fn workflows_that_never_end_are_logged_unless_somebody_tells_an_end() {
    use opentelemetry_sdk::trace::Sampler;

    log();
    for tells_an_end in [true, false] {
        let storage = WorkflowContextStorage::builder().durable_root(true);
        let storage = storage.build().expect("valid settings");
        let provider = SdkTracerProvider::builder()
            .with_id_generator(storage.id_generator())
            .with_sampler(storage.sampler(Sampler::AlwaysOn))
            .build();
        let tracer = storage.tracer(provider.tracer("test"));
        for n in 0..300 {
            let tag = KeyValue::new("workflow.instance_id", format!("order-{n}"));
            drop(tracer.build(SpanBuilder::from_name("step").with_attributes([tag])));
            if tells_an_end && n == 0 {
                storage
                    .complete("order-0", "completed")
                    .expect("it is stored");
            }
        }
    }
    let logged = logged("were never ended");
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert!(logged[0].contains("times=256"), "{logged:?}");
}
