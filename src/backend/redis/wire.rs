//! A connection whose every step has a deadline.
//!
//! The redis crate (1.2.2, `src/connection.rs`) knows timeouts of a single read alone, and gives no access to its socket: a
//! server that sends a byte now and then holds up a call without a bound. So the socket is ours; the URL, the commands and
//! the replies are the crate's.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
#[cfg(feature = "redis-tls")]
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::{Client, Cmd, ConnectionAddr, Parser, RedisResult, Value, cmd};

/// A connection that is logged in.
pub(super) struct Wire {
    stream: Stream,
    parser: Parser,
}

enum Stream {
    Plain(Timed),
    #[cfg(feature = "redis-tls")]
    Tls(Box<rustls::StreamOwned<rustls::ClientConnection, Timed>>),
}

/// A socket that fails once its deadline has passed.
struct Timed {
    socket: Socket,
    deadline: Instant,
}

enum Socket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl Wire {
    /// Connects and logs in, by that deadline. The time to resolve a name is up to the operating system.
    pub(super) fn open(client: &Client, deadline: Instant) -> RedisResult<Self> {
        let info = client.get_connection_info();
        let stream = match info.addr() {
            ConnectionAddr::Tcp(host, port) => Stream::Plain(Timed::to(host, *port, deadline)?),
            #[cfg(feature = "redis-tls")]
            ConnectionAddr::TcpTls {
                host,
                port,
                insecure: false,
                ..
            } => Stream::Tls(Box::new(tls(host, Timed::to(host, *port, deadline)?)?)),
            #[cfg(unix)]
            ConnectionAddr::Unix(path) => Stream::Plain(Timed {
                socket: Socket::Unix(UnixStream::connect(path)?),
                deadline,
            }),
            _ => return Err(io::Error::from(ErrorKind::Unsupported).into()),
        };
        let mut wire = Self {
            stream,
            parser: Parser::new(),
        };
        let settings = info.redis_settings();
        if let Some(password) = settings.password() {
            let mut auth = cmd("AUTH");
            auth.arg(settings.username()).arg(password);
            wire.ask(&auth, deadline)?;
        }
        if settings.db() != 0 {
            wire.ask(cmd("SELECT").arg(settings.db()), deadline)?;
        }
        Ok(wire)
    }

    /// Returns the reply to a command. An error reply is an error.
    pub(super) fn ask(&mut self, command: &Cmd, deadline: Instant) -> RedisResult<Value> {
        self.send(&command.get_packed_command(), deadline)?;
        match self.receive(deadline)? {
            Value::ServerError(error) => Err(error.into()),
            reply => Ok(reply),
        }
    }

    pub(super) fn send(&mut self, packed: &[u8], deadline: Instant) -> RedisResult<()> {
        let stream = self.stream.by(deadline);
        stream.write_all(packed)?;
        Ok(stream.flush()?)
    }

    /// Returns the next reply.
    pub(super) fn receive(&mut self, deadline: Instant) -> RedisResult<Value> {
        self.parser.parse_value(self.stream.by(deadline))
    }
}

impl Stream {
    fn by(&mut self, deadline: Instant) -> &mut dyn ReadWrite {
        match self {
            Self::Plain(timed) => {
                timed.deadline = deadline;
                timed
            }
            #[cfg(feature = "redis-tls")]
            Self::Tls(stream) => {
                stream.sock.deadline = deadline;
                stream
            }
        }
    }
}

trait ReadWrite: Read + Write {}

impl<S: Read + Write> ReadWrite for S {}

impl Timed {
    /// Tries one address of the host after the other, each with an equal part of the time that is left.
    fn to(host: &str, port: u16, deadline: Instant) -> io::Result<Self> {
        let mut addresses = (host, port).to_socket_addrs()?;
        let mut result = Err(ErrorKind::NotFound.into());
        while let Some(address) = addresses.next() {
            let others = u32::try_from(addresses.size_hint().0).unwrap_or(0);
            let left = left(deadline)? / (others + 1);
            result = TcpStream::connect_timeout(&address, left.max(MIN));
            if result.is_ok() {
                break;
            }
        }
        let stream = result?;
        stream.set_nodelay(true)?;
        let socket = Socket::Tcp(stream);
        Ok(Self { socket, deadline })
    }
}

/// The shortest timeout that every system accepts.
const MIN: Duration = Duration::from_millis(1);

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(ErrorKind::TimedOut.into()),
        false => Ok(left.max(MIN)),
    }
}

/// Says `TimedOut` where Unix says that the call would block.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = Some(left(self.deadline)?);
        let read = match &mut self.socket {
            Socket::Tcp(stream) => {
                stream.set_read_timeout(left)?;
                stream.read(buffer)
            }
            #[cfg(unix)]
            Socket::Unix(stream) => {
                stream.set_read_timeout(left)?;
                stream.read(buffer)
            }
        };
        read.map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = Some(left(self.deadline)?);
        let written = match &mut self.socket {
            Socket::Tcp(stream) => {
                stream.set_write_timeout(left)?;
                stream.write(bytes)
            }
            #[cfg(unix)]
            Socket::Unix(stream) => {
                stream.set_write_timeout(left)?;
                stream.write(bytes)
            }
        };
        written.map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Speaks TLS on a socket. The certificate of the server is verified with the roots of the operating system; the
/// handshake is a part of the first write.
#[cfg(feature = "redis-tls")]
fn tls(
    host: &str,
    socket: Timed,
) -> io::Result<rustls::StreamOwned<rustls::ClientConnection, Timed>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = rustls::ClientConfig::builder().with_root_certificates(roots);
    let config = Arc::new(config.with_no_client_auth());
    // An IPv6 address has brackets in a URL.
    let name = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let name = name.try_into().map_err(io::Error::other)?;
    let connection = rustls::ClientConnection::new(config, name).map_err(io::Error::other)?;
    Ok(rustls::StreamOwned::new(connection, socket))
}
