//! Redis servers for one test.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Directory, PATIENCE, Server, free_port};

/// A new, empty server on this machine, which is stopped when this is dropped.
#[derive(Debug)]
pub(crate) struct RedisServer {
    process: Child,
    port: u16,
    /// The working directory: a replica stores its copy there, and each server must have its own.
    _directory: Directory,
}

impl RedisServer {
    pub(crate) fn start() -> Self {
        // Another process may take the port between its choice and its use.
        (0..10)
            .find_map(|_| Self::try_start(free_port(), &[]))
            .expect("redis-server starts on one of ten free ports")
    }

    /// Starts a server that also speaks TLS; returns the TLS port too.
    #[cfg(feature = "redis-tls")]
    pub(crate) fn start_with_tls(certificate: &str, key: &str) -> (Self, u16) {
        Self::start_with_tls_and(certificate, key, &[])
    }

    /// Starts the first node of a Cluster, which also speaks TLS; returns the TLS port too.
    #[cfg(feature = "redis-tls")]
    pub(crate) fn start_in_cluster_with_tls(certificate: &str, key: &str) -> (Self, u16) {
        let bus_port = free_port().to_string();
        let arguments = [
            ["--cluster-enabled", "yes"],
            ["--cluster-port", &bus_port],
            ["--tls-cluster", "yes"],
        ];
        Self::start_with_tls_and(certificate, key, arguments.as_flattened())
    }

    #[cfg(feature = "redis-tls")]
    fn start_with_tls_and(certificate: &str, key: &str, more: &[&str]) -> (Self, u16) {
        (0..10)
            .find_map(|_| {
                let port = free_port();
                let tls_port = port.to_string();
                let arguments = [
                    ["--tls-port", &tls_port],
                    ["--tls-cert-file", certificate],
                    ["--tls-key-file", key],
                    ["--tls-ca-cert-file", certificate],
                    ["--tls-auth-clients", "no"],
                ];
                let arguments = [arguments.as_flattened(), more].concat();
                let server = Self::try_start(free_port(), &arguments)?;
                Some((server, port))
            })
            .expect("redis-server starts with TLS")
    }

    /// Starts a replica of another server.
    pub(crate) fn start_replica_of(master: &Self) -> Self {
        let of = format!("127.0.0.1 {}", master.port);
        (0..10)
            .find_map(|_| Self::try_start(free_port(), &["--replicaof", &of]))
            .expect("redis-server starts as a replica")
    }

    /// Starts a node of a Cluster that has not met others yet. It keeps its configuration in that directory, and
    /// considers others failed after that time.
    pub(crate) fn start_in_cluster(directory: &std::path::Path, patience: Duration) -> Self {
        (0..10)
            .find_map(|_| Self::try_start_in_cluster(free_port(), directory, patience))
            .expect("redis-server starts as a node of a Cluster")
    }

    /// Restarts a node of a Cluster, empty but with its configuration.
    pub(crate) fn start_again_in_cluster(
        &mut self,
        directory: &std::path::Path,
        patience: Duration,
    ) {
        self.stop();
        let deadline = Instant::now() + PATIENCE;
        *self = loop {
            match Self::try_start_in_cluster(self.port, directory, patience) {
                Some(server) => break server,
                None => assert!(Instant::now() < deadline, "redis-server starts again"),
            }
        };
    }

    fn try_start_in_cluster(
        port: u16,
        directory: &std::path::Path,
        patience: Duration,
    ) -> Option<Self> {
        let patience = patience.as_millis().to_string();
        let directory = directory.to_str().expect("text");
        // The default bus port is 10,000 above, which may exceed 65,535.
        let bus_port = free_port().to_string();
        let arguments = [
            ["--cluster-enabled", "yes"],
            ["--cluster-node-timeout", &patience],
            ["--cluster-require-full-coverage", "no"],
            ["--cluster-port", &bus_port],
            ["--dir", directory],
        ];
        Self::try_start(port, arguments.as_flattened())
    }

    /// Starts a sentinel that monitors a server, and considers it failed after half a second.
    pub(crate) fn start_sentinel(file: &std::path::Path, service: &str, master: &Self) -> Self {
        let settings = format!(
            "sentinel monitor {service} 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds {service} 500\n\
             sentinel failover-timeout {service} 2000\n",
            master.port
        );
        (0..10)
            .find_map(|_| {
                let port = free_port();
                let settings = format!("port {port}\nbind 127.0.0.1\n{settings}");
                std::fs::write(file, settings).expect("a file");
                let mut command = Command::new("redis-server");
                command.arg(file).arg("--sentinel");
                Self::try_command(port, command)
            })
            .expect("redis-server starts as a sentinel")
    }

    /// Kills the process, as a crash would.
    pub(crate) fn stop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Restarts the server, empty.
    pub(crate) fn start_again(&mut self) {
        self.stop();
        let deadline = Instant::now() + PATIENCE;
        *self = loop {
            match Self::try_start(self.port, &[]) {
                Some(server) => break server,
                None => assert!(Instant::now() < deadline, "redis-server starts again"),
            }
        };
    }

    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.process.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status();
        assert!(status.expect("kill(1) can be run").success());
    }

    fn try_start(port: u16, more: &[&str]) -> Option<Self> {
        let mut command = Command::new("redis-server");
        command
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--daemonize", "no"])
            .args(more);
        Self::try_command(port, command)
    }

    fn try_command(port: u16, mut command: Command) -> Option<Self> {
        let directory = Directory::new();
        let process = command
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("redis-server cannot be run: {error}; install the package redis-server")
            });
        let mut server = Self {
            process,
            port,
            _directory: directory,
        };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Ok(Some(_)) = server.process.try_wait() {
                return None;
            }
            if replies_to_ping(port) {
                return Some(server);
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-server does not reply to PING");
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Server for RedisServer {
    fn port(&self) -> u16 {
        self.port
    }

    fn url_at(&self, port: u16) -> String {
        format!("redis://127.0.0.1:{port}/")
    }
}

fn replies_to_ping(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        let mut reply = [0; 5];
        stream.read_exact(&mut reply)?;
        Ok(reply == *b"+PONG")
    };
    ask().unwrap_or(false)
}
