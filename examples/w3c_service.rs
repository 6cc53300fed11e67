//! The HTTP service that the test suite of W3C Trace Context drives (<https://github.com/w3c/trace-context/tree/main/test>):
//! `scripts/w3c` runs it. Each request is a workflow, whose first span continues what came in by `extract`. Each call that the
//! suite asks for is a later span, on another thread: it continues what the storage has, and sends its own context along by
//! `inject`.
//!
//! ```sh
//! cargo run --example w3c_service -- 127.0.0.1:5000
//! ```

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use opentelemetry::propagation::{Extractor, Injector};
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use serde_json::Value;
use tracing::info_span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The longest body that is read.
const MAX_BODY: u64 = 1 << 20;

const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

fn main() -> Result<()> {
    let storage = WorkflowContextStorage::new();
    // Of a span that is not sampled, the SDK drops the random flag.
    let provider = SdkTracerProvider::builder();
    let provider = provider.with_sampler(Sampler::AlwaysOn).build();
    let layer = storage.layer(provider.tracer("w3c_service"));
    tracing_subscriber::registry().with(layer).init();

    let address = std::env::args().nth(1);
    let listener = TcpListener::bind(address.as_deref().unwrap_or("127.0.0.1:5000"))?;
    println!("listening on http://{}/test", listener.local_addr()?);
    for (number, stream) in listener.incoming().enumerate() {
        let stream = stream?;
        let storage = storage.clone();
        thread::spawn(move || {
            if let Err(error) = serve(&storage, &stream, &format!("request-{number}")) {
                eprintln!("request {number}: {error}");
                let _ = answer(&stream, "500 Internal Server Error");
            }
        });
    }
    Ok(())
}

/// Carries out one request: an array of calls, each with its `url` and the `arguments` to send there.
fn serve(storage: &WorkflowContextStorage, stream: &TcpStream, workflow: &str) -> Result<()> {
    stream.set_read_timeout(PATIENCE)?;
    let (headers, body) = read_message(stream)?;
    let calls: Vec<Value> = serde_json::from_slice(&body)?;

    let request = info_span!("request", workflow.instance_id = workflow);
    if let Ok(received) = WorkflowContext::extract(&headers) {
        request.set_parent(received.to_otel())?;
    }
    request.in_scope(|| ());
    for call in &calls {
        let step = || {
            let stored = storage.get(workflow)?.ok_or("nothing is stored")?;
            let span = info_span!("call", workflow.instance_id = workflow);
            span.set_parent(stored.to_otel())?;
            span.in_scope(|| post(call))
        };
        thread::scope(|scope| scope.spawn(step).join()).map_err(|_| "a call panicked")??;
    }
    answer(stream, "200 OK")
}

fn post(call: &Value) -> Result<()> {
    let url = call["url"].as_str().ok_or("a call without a url")?;
    let rest = url.strip_prefix("http://").ok_or("not an http url")?;
    let (host, path) = rest.split_once('/').ok_or("a url without a path")?;
    let mut headers = Headers::default();
    let current = WorkflowContext::current().ok_or("no current span")?;
    current.inject(&mut headers);
    let headers = headers.0.iter();
    let headers: String = headers.map(|(k, v)| format!("{k}: {v}\r\n")).collect();

    let body = call["arguments"].to_string();
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(PATIENCE)?;
    write!(
        stream,
        "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    stream.take(MAX_BODY).read_to_end(&mut Vec::new())?;
    Ok(())
}

fn answer(mut stream: &TcpStream, status: &str) -> Result<()> {
    Ok(write!(
        stream,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: 2\r\n\r\n[]"
    )?)
}

fn read_message(stream: &TcpStream) -> Result<(Headers, Vec<u8>)> {
    let mut reader = BufReader::new(stream.take(MAX_BODY));
    let mut headers = Headers::default();
    reader.read_line(&mut String::new())?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end_matches(['\r', '\n']).split_once(':') else {
            break;
        };
        headers.0.push((name.to_owned(), value.to_owned()));
    }
    let length = headers.get("content-length").ok_or("no length")?;
    let mut body = vec![0; length.trim().parse::<u32>()?.min(MAX_BODY as u32) as usize];
    reader.read_exact(&mut body)?;
    Ok((headers, body))
}

/// The headers of a message. A name can be there several times, in any letter case.
#[derive(Default)]
struct Headers(Vec<(String, String)>);

impl Extractor for Headers {
    fn get(&self, key: &str) -> Option<&str> {
        let (_, value) = (self.0.iter()).find(|(name, _)| name.eq_ignore_ascii_case(key))?;
        Some(value)
    }

    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        let is_named = |(name, _): &&(String, String)| name.eq_ignore_ascii_case(key);
        let named = self.0.iter().filter(is_named);
        Some(named.map(|(_, value)| &**value).collect())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(key, _)| &**key).collect()
    }
}

impl Injector for Headers {
    fn set(&mut self, key: &str, value: String) {
        self.0.push((key.to_owned(), value));
    }
}
