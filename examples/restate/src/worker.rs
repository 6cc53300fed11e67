//! A worker process: the SDK's HTTP endpoint, and the subscriber whose one line this example is about.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::net::Ipv4Addr;
use std::path::Path;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use restate_sdk::prelude::{Endpoint, HttpServer};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_workflow_context::{Engine, WorkflowContext, WorkflowContextStorage};

use crate::order::Order;
use crate::{Result, spans, traceparent};

/// Which layer turns the worker's spans into OpenTelemetry's.
#[derive(Clone, Copy)]
pub(crate) enum Layer {
    Plain,
    WorkflowContext,
    /// The plain one, within the server's trace.
    PlainInServerTrace,
    /// This crate's within the server's trace, with replays silent.
    ServerTrace,
}

const LAYERS: [Layer; 4] = [
    Layer::Plain,
    Layer::WorkflowContext,
    Layer::PlainInServerTrace,
    Layer::ServerTrace,
];

impl Layer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::WorkflowContext => "workflow-context",
            Self::PlainInServerTrace => "plain-in-server-trace",
            Self::ServerTrace => "server-trace",
        }
    }
}

impl FromStr for Layer {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        LAYERS
            .into_iter()
            .find(|layer| layer.name() == name)
            .ok_or_else(|| format!("no layer is called {name}"))
    }
}

/// Serves until standard input is closed, which also happens when the driver dies.
pub(crate) async fn run(layer: Layer, number: u32, port: u16, directory: &Path) -> Result<()> {
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans::FileExporter::create(&spans::file(
            directory, number,
        ))?)
        .build();
    let tracer = provider.tracer("restate-example");

    // At TRACE the SDK's core opens spans of its own, which hide the handler's from the engine's: see the README.
    let subscriber = tracing_subscriber::registry().with(LevelFilter::INFO);
    match layer {
        Layer::Plain | Layer::PlainInServerTrace => subscriber
            .with(tracing_opentelemetry::layer().with_tracer(tracer))
            .init(),
        Layer::WorkflowContext | Layer::ServerTrace => {
            let mut builder = WorkflowContextStorage::builder().engine(Engine::Restate);
            if let Layer::ServerTrace = layer {
                // Its `false` may be missed, so each span of new work says that it is such: see `order.rs`.
                builder = builder.replay_children_field("restate.sdk.is_replaying");
            }
            let storage = builder.build()?;
            let contexts = directory.join("contexts.json");
            load(&storage, &contexts)?;
            subscriber.with(storage.layer(tracer)).init();
            thread::spawn(move || keep_saved(&storage, &contexts));
        }
    }

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    let endpoint = Endpoint::builder().bind(Order).build();
    match layer {
        Layer::Plain | Layer::WorkflowContext => {
            HttpServer::new(endpoint)
                .serve_with_cancel(listener, closed_input())
                .await;
        }
        Layer::PlainInServerTrace | Layer::ServerTrace => {
            traceparent::serve(endpoint, listener, closed_input()).await;
        }
    }
    provider.shutdown()?;
    Ok(())
}

/// What one worker stored the next must know. A backend which the workers share would do it; this file stands in for
/// one, by the storage's explicit half: instance id -> traceparent, tracestate.
type Contexts = BTreeMap<String, (String, String)>;

fn load(storage: &WorkflowContextStorage, file: &Path) -> Result<()> {
    let contexts: Contexts = match fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for (id, (traceparent, tracestate)) in contexts {
        storage.store(&id, WorkflowContext::parse(&traceparent, &tracestate)?)?;
    }
    Ok(())
}

/// Saves all the time, for whoever is killed cannot save at the end.
fn keep_saved(storage: &WorkflowContextStorage, file: &Path) {
    loop {
        if let Err(error) = save(storage, file) {
            eprintln!("saving the contexts: {error}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn save(storage: &WorkflowContextStorage, file: &Path) -> Result<()> {
    let mut contexts = Contexts::new();
    for id in storage.instance_ids() {
        if let Some(context) = storage.get(&id)? {
            contexts.insert(id, (context.traceparent(), context.tracestate()));
        }
    }
    // Renamed into place: a kill must not leave half a file.
    let unfinished = file.with_extension("unfinished");
    fs::write(&unfinished, serde_json::to_vec(&contexts)?)?;
    Ok(fs::rename(unfinished, file)?)
}

async fn closed_input() {
    let (closed, wait) = oneshot::channel();
    thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        let _ = closed.send(());
    });
    let _ = wait.await;
}
