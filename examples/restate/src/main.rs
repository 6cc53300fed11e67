//! One order, run by a real Restate server and two workers of which the first is killed: how many traces?
//!
//! `restate-example <path to restate-server> [server-trace]` drives it all. It starts itself again as the workers. With
//! `server-trace`, the server exports spans too, and the order belongs into their trace.

mod driver;
mod order;
mod receiver;
mod server_trace;
mod spans;
mod traceparent;
mod worker;

use std::error::Error;
use std::path::Path;

use tokio::runtime::Runtime;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    OwnTrace,
    ServerTrace,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();

    let runtime = Runtime::new()?;
    let outcome = match arguments[..] {
        [] => match std::env::var_os("RESTATE_SERVER") {
            Some(server) => runtime.block_on(driver::run(Path::new(&server), Mode::OwnTrace)),
            None => {
                Err("name the restate-server binary: as the argument or in RESTATE_SERVER".into())
            }
        },
        ["worker", layer, number, port, directory] => runtime.block_on(worker::run(
            layer.parse()?,
            number.parse()?,
            port.parse()?,
            Path::new(directory),
        )),
        [server] => runtime.block_on(driver::run(Path::new(server), Mode::OwnTrace)),
        [server, "server-trace"] => {
            runtime.block_on(driver::run(Path::new(server), Mode::ServerTrace))
        }
        _ => Err("usage: restate-example [path to restate-server [server-trace]]".into()),
    };
    // An HTTP call may still be waiting in a thread when the driver was interrupted.
    runtime.shutdown_background();
    outcome
}
