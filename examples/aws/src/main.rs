//! Orders through AWS's durable executions, each invocation in a process of its own: traced by the plain OpenTelemetry layer,
//! then by `tracing-workflow-context` with a file for a store, and without any store. `scripts/engine-aws` installs the emulator
//! and runs this.

mod emulator;
mod expected;
mod function;
mod functions;
mod lambda;
mod pipe;

use std::error::Error;
use std::path::Path;

use crate::emulator::Emulator;
use crate::lambda::Lambda;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The orders that are placed, all at once.
const ORDERS: [&str; 4] = ["order-1", "order-2", "order-3", "order-4"];

/// How the functions are traced.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    /// This crate, with the file of a `RedbBackend`.
    Redb,
    /// This crate, with derived ids and durable roots: no process knows of another one.
    Derived,
}

impl Way {
    const ALL: [Self; 3] = [Self::Plain, Self::Redb, Self::Derived];

    /// Returns its name, which is an argument of a function's process.
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain layer",
            Self::Redb => "redb",
            Self::Derived => "derived ids, no store",
        }
    }

    fn of_name(name: &str) -> Result<Self> {
        let way = Self::ALL.into_iter().find(|way| way.name() == name);
        way.ok_or_else(|| format!("no such way: {name}").into())
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [function::ARGUMENT, way, dir] => function::run(Way::of_name(way)?, Path::new(dir)),
        [runner] => compare(runner),
        _ => Err("usage: scripts/engine-aws".into()),
    }
}

/// Runs all orders in each way, with the emulator's program.
fn compare(runner: &str) -> Result<()> {
    let mut table = Vec::new();
    for way in Way::ALL {
        eprintln!("engine-aws: {} orders with: {}", ORDERS.len(), way.name());
        table.push(run(way, runner)?);
    }
    println!("{}", expected::HEADER);
    for counts in table {
        println!("{counts}");
    }
    Ok(())
}

/// Runs all orders in one way. Returns a line of counts.
fn run(way: Way, runner: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let port = emulator::free_port()?;
    let lambda = Lambda::new(way, dir.path(), port);
    let lambda_port = runtime.block_on(lambda.serve())?;
    let emulator = Emulator::start(runner, port, lambda_port, dir.path())?;
    for order in ORDERS {
        emulator.start_execution(functions::ORDER, order)?;
    }
    let ended = emulator.wait_for_all(|| lambda.failure());
    // No function runs any more, or none shall.
    drop(emulator);
    drop(runtime);
    ended?;
    expected::check(way, lambda.invocations(), &lambda.spans())
}
