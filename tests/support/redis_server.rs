//! A Redis server of one test, and a proxy that spoils what it says.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Directory;

const PATIENCE: Duration = Duration::from_secs(30);

/// A server of its own on this machine, empty, which ends with this.
#[derive(Debug)]
pub struct RedisServer {
    process: Child,
    port: u16,
    /// Where a replica keeps what it was sent; a server that starts there has it.
    _directory: Directory,
}

impl RedisServer {
    pub fn start() -> Self {
        // Somebody else may take a port between its choice and its use.
        (0..10)
            .find_map(|_| Self::try_start(free_port(), &[]))
            .expect("redis-server starts on one of ten free ports")
    }

    /// A server that speaks TLS too, on a port of its own, which is answered.
    pub fn start_with_tls(certificate: &str, key: &str) -> (Self, u16) {
        Self::start_with_tls_and(certificate, key, &[])
    }

    /// The same, of a Cluster, of which it is the first.
    pub fn start_in_cluster_with_tls(certificate: &str, key: &str) -> (Self, u16) {
        let bus_port = free_port().to_string();
        let arguments = [
            ["--cluster-enabled", "yes"],
            ["--cluster-port", &bus_port],
            ["--tls-cluster", "yes"],
        ];
        Self::start_with_tls_and(certificate, key, arguments.as_flattened())
    }

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

    /// A server that follows another one.
    pub fn start_replica_of(master: &Self) -> Self {
        let of = format!("127.0.0.1 {}", master.port);
        (0..10)
            .find_map(|_| Self::try_start(free_port(), &["--replicaof", &of]))
            .expect("redis-server starts as a replica")
    }

    /// A server of a Cluster, by itself as yet, which keeps in that directory what it knows of the others, and takes them
    /// for dead after that time.
    pub fn start_in_cluster(directory: &std::path::Path, patience: Duration) -> Self {
        (0..10)
            .find_map(|_| Self::try_start_in_cluster(free_port(), directory, patience))
            .expect("redis-server starts as a part of a Cluster")
    }

    /// Starts a server of a Cluster again, empty, with what it knows of the others.
    pub fn start_again_in_cluster(&mut self, directory: &std::path::Path, patience: Duration) {
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
        // The usual bus port, 10,000 above, may be none.
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

    /// A sentinel that watches over a server, and takes it for dead after half a second.
    pub fn start_sentinel(file: &std::path::Path, service: &str, master: &Self) -> Self {
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

    /// Ends the process at once, as a crash would.
    pub fn stop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again, empty.
    pub fn start_again(&mut self) {
        self.stop();
        let deadline = Instant::now() + PATIENCE;
        *self = loop {
            match Self::try_start(self.port, &[]) {
                Some(server) => break server,
                None => assert!(Instant::now() < deadline, "redis-server starts again"),
            }
        };
    }

    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        url(self.port)
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
            if answers(port) {
                return Some(server);
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-server does not answer");
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}/")
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}

fn answers(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer)?;
        Ok(answer == *b"+PONG")
    };
    ask().unwrap_or(false)
}

/// What a proxy does to what the server says.
#[derive(Clone, Debug)]
pub enum Says {
    /// Hands it on.
    That,
    /// Hands it on after that time.
    Later(Duration),
    /// Hands it on byte by byte, a hundred in a second.
    Slowly,
    /// Says this in its place.
    This(Vec<u8>),
}

/// Stands between a client and a server until the test ends.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    says: Arc<Mutex<Says>>,
}

impl Proxy {
    pub fn before(server: &RedisServer) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let (says, to) = (Arc::new(Mutex::new(Says::That)), server.port());
        let all_say = says.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if let Ok(server) = TcpStream::connect(("127.0.0.1", to)) {
                    let pair = (client.try_clone(), server.try_clone());
                    if let (Ok(to_client), Ok(from_server)) = pair {
                        thread::spawn(move || hand_on(client, server, None));
                        let says = all_say.clone();
                        thread::spawn(move || hand_on(from_server, to_client, Some(&says)));
                    }
                }
            }
        });
        Self { port, says }
    }

    pub fn says(&self, says: Says) {
        *self.says.lock().unwrap() = says;
    }

    pub fn url(&self) -> String {
        url(self.port)
    }
}

fn hand_on(mut from: TcpStream, mut to: TcpStream, says: Option<&Mutex<Says>>) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let says = says.map_or(Says::That, |says| says.lock().unwrap().clone());
        let written = match says {
            Says::That => to.write_all(&buffer[..read]),
            Says::Later(delay) => {
                thread::sleep(delay);
                to.write_all(&buffer[..read])
            }
            Says::Slowly => buffer[..read].iter().try_for_each(|byte| {
                thread::sleep(Duration::from_millis(10));
                to.write_all(&[*byte])
            }),
            Says::This(other) => to.write_all(&other),
        };
        if written.is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
