//! Looks into a store: lists its instances, or explains one and prints the URL of its trace.
//!
//! ```text
//! cargo run --example inspect --features redb,redis,postgres -- <store> [<instance id>] [<options>]
//!
//! <store>             a file of RedbBackend, redis://.. (rediss:// with the feature redis-tls) or postgres://..
//! --namespace <name>  that of the workers' builder
//! --jaeger <url>      the UI in which the trace is to be seen, such as http://localhost:16686;
//! --phoenix <url>     http://localhost:6006;
//! --tempo <url>       Grafana with a data source named `tempo`, http://localhost:3000;
//! --url <template>    or any other, with {trace} where the trace id belongs
//! --json              one JSON object a line
//! ```
//!
//! A file has one owner: stop the worker, or look at a copy.

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tracing_workflow_context::backend::{Record, StorageBackend, instance_of_key};
use tracing_workflow_context::{
    PostgresBackend, RedbBackend, RedisBackend, WorkflowContextStorage,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Options {
    store: String,
    id: Option<String>,
    namespace: String,
    template: Option<String>,
    json: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let (mut plain, mut namespace, mut template, mut json) =
            (vec![], String::new(), None, false);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--json" => json = true,
                "--namespace" => namespace = value()?,
                "--url" => template = Some(value()?),
                "--jaeger" => template = Some(value()? + "/trace/{trace}"),
                "--phoenix" => template = Some(value()? + "/redirects/traces/{trace}"),
                // Grafana takes the state of its Explore page as JSON, percent-encoded.
                "--tempo" => {
                    template = Some(
                        value()?
                            + "/explore?left=%7B%22datasource%22%3A%22tempo%22%2C%22queries%22%3A%5B%7B%22refId%22%3A%22A\
                               %22%2C%22queryType%22%3A%22traceql%22%2C%22query%22%3A%22{trace}%22%7D%5D%7D",
                    );
                }
                _ if argument.starts_with("--") => {
                    return Err(format!("no such option: {argument}").into());
                }
                _ => plain.push(argument),
            }
        }
        let mut plain = plain.into_iter();
        Ok(Self {
            store: plain
                .next()
                .ok_or("usage: inspect <store> [<instance id>] [--json] [--jaeger <url>] ..")?,
            id: plain.next(),
            namespace,
            template,
            json,
        })
    }

    /// Returns the URL of a trace.
    fn url(&self, record: &Record) -> Option<String> {
        let trace = record.context.trace_id().to_string();
        Some(self.template.as_ref()?.replace("{trace}", &trace))
    }
}

/// Returns the instances of a store, sorted by their ids.
fn instances(backend: &dyn StorageBackend, options: &Options) -> Result<Vec<(String, Record)>> {
    let mut found = Vec::new();
    backend.scan(&mut |key, record| {
        if let Some(id) = instance_of_key(&options.namespace, key) {
            if options.id.as_ref().is_none_or(|wanted| *wanted == id) {
                found.push((id.into_owned(), record));
            }
        }
    })?;
    found.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(found)
}

fn inspect(backend: impl StorageBackend, options: &Options, out: &mut dyn Write) -> Result<()> {
    let found = instances(&backend, options)?;
    for (id, record) in &found {
        if options.json {
            writeln!(out, "{}", as_json(id, record, options.url(record)))?;
        } else {
            writeln!(out, "{}", as_line(id, record, options.url(record)))?;
        }
    }
    let Some(id) = &options.id else {
        return Ok(());
    };
    if found.is_empty() {
        return Err(format!("{id:?} is not in the store, or has expired").into());
    }
    if !options.json {
        let mut storage = WorkflowContextStorage::builder()
            .backend(backend)
            .lookup_budget(Duration::from_secs(5));
        if !options.namespace.is_empty() {
            storage = storage.namespace(options.namespace.clone());
        }
        let storage = storage.build()?;
        storage.get(id)?; // into memory, which is what is explained
        writeln!(out, "\n{}", storage.explain(id))?;
    }
    Ok(())
}

fn as_line(id: &str, record: &Record, url: Option<String>) -> String {
    let cx = &record.context;
    let age = SystemTime::now().duration_since(cx.recorded_at());
    let age = age.unwrap_or_default().as_secs();
    let mut line = format!("{id:?}  trace {}  {age} s old", cx.trace_id());
    if let Some(run) = &record.run_id {
        line += &format!("  run {run:?}");
    }
    if let Some(root) = &record.root {
        line += &format!(
            "  workflow {:?} with {} spans so far",
            root.name, root.spans
        );
    }
    url.map_or(line.clone(), |url| format!("{line}  {url}"))
}

fn as_json(id: &str, record: &Record, url: Option<String>) -> serde_json::Value {
    let seconds = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH);
        since.unwrap_or_default().as_secs()
    };
    json!({
        "instance_id": id,
        "run_id": record.run_id,
        "traceparent": record.context.traceparent(),
        "trace_id": record.context.trace_id().to_string(),
        "generation": record.generation,
        "recorded_at": seconds(record.context.recorded_at()),
        "expires_at": seconds(record.expires_at),
        "workflow": record.root.as_ref().map(|root| &root.name),
        "url": url,
    })
}

/// Does what the arguments say, and writes what is found to `out`.
pub(crate) fn run(arguments: impl Iterator<Item = String>, out: &mut dyn Write) -> Result<()> {
    let options = &Options::parse(arguments)?;
    let store = options.store.as_str();
    match store.split_once("://") {
        Some(("redis" | "rediss", _)) => inspect(RedisBackend::connect(store)?, options, out),
        Some(("postgres" | "postgresql", _)) => {
            inspect(PostgresBackend::connect(store)?, options, out)
        }
        Some((scheme, _)) => {
            Err(format!("{scheme}: a store is a file, redis:// or postgres://").into())
        }
        // A missing file would be created.
        None if !Path::new(store).is_file() => Err(format!("there is no file {store}").into()),
        None => inspect(RedbBackend::open(store)?, options, out),
    }
}

fn main() -> Result<()> {
    run(env::args().skip(1), &mut io::stdout().lock())
}
