//! The servers: Temporal's for tests, and a `redis-server`. Each has a port that was free, and ends with its value.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// How long a server may take until it answers.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Server {
    process: Child,
    port: u16,
}

impl Server {
    /// Starts Temporal's server for tests, which keeps all in memory. It binds to all interfaces: scripts/engine-temporal
    /// leaves it none but loopback.
    pub fn temporal(program: &str) -> Result<Self> {
        Self::start(program, |port| vec![port])
    }

    /// Starts a Redis server that keeps nothing, and finds nothing.
    pub fn redis() -> Result<Self> {
        let args = [
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dbfilename",
            "none.rdb",
        ];
        let args = args.map(str::to_owned);
        Self::start("redis-server", |port| {
            ["--port".to_owned(), port]
                .into_iter()
                .chain(args)
                .collect()
        })
    }

    fn start(program: &str, args: impl FnOnce(String) -> Vec<String>) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let process = Command::new(program)
            .args(args(port.to_string()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let mut server = Self { process, port };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let status = server.process.try_wait()?;
            ensure!(status.is_none(), "{program} ended: {status:?}");
            ensure!(Instant::now() < deadline, "{program} does not answer");
            sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://127.0.0.1:{}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
