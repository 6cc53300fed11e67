//! What is said to the process-wide subscriber, and how often: own file, because that is process-wide.
#![cfg(feature = "testing")]

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::info_span;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
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

#[test]
fn an_oversized_id_is_told_once_and_without_control_characters() {
    let log = Log::default();
    let storage = WorkflowContextStorage::new();
    let provider = SdkTracerProvider::builder().build();
    let fmt = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(log.clone());
    let ours = storage.layer(provider.tracer("test"));
    tracing_subscriber::registry().with(ours).with(fmt).init();

    let id = format!("\u{1b}[31m\n{}", "x".repeat(5000));
    for _ in 0..1000 {
        info_span!("step", workflow.instance_id = &id).in_scope(|| ());
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log.text().contains("at most 1024 bytes") {
        assert!(
            Instant::now() < deadline,
            "nothing was said: {}",
            log.text()
        );
        std::thread::yield_now();
    }
    for _ in 0..1000 {
        info_span!("step", workflow.instance_id = &id).in_scope(|| ());
    }

    let text = log.text();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains(" WARN ") && text.contains("5006 bytes"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}') && text.len() < 600, "{text}");
    assert_eq!(storage.stats().oversized, 2000);
    assert!(storage.instance_ids().is_empty());
}
