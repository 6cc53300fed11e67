//! A proxy before a server of a test, which delays or replaces its replies.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A server on this machine.
pub(crate) trait Server {
    fn port(&self) -> u16;

    /// Returns the URL under which this server could be reached at another port.
    fn url_at(&self, port: u16) -> String;

    fn url(&self) -> String {
        self.url_at(self.port())
    }
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// How a proxy treats replies of the server.
#[derive(Clone, Debug)]
pub(crate) enum Replies {
    /// Forwards them.
    Forward,
    /// Forwards each after a delay.
    Delay(Duration),
    /// Forwards them byte by byte, each after a pause.
    Trickle(Duration),
    /// Sends these bytes instead.
    Replace(Vec<u8>),
}

/// A proxy between clients and a server; it runs until the process ends.
#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    url: String,
    replies: Arc<Mutex<Replies>>,
    /// The bytes that the server has replied with.
    forwarded: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) fn before(server: &impl Server) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let (url, to) = (server.url_at(port), server.port());
        let replies = Arc::new(Mutex::new(Replies::Forward));
        let forwarded = Arc::new(AtomicUsize::new(0));
        let (replies_of_all, all_forwarded) = (replies.clone(), forwarded.clone());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if let Ok(server) = TcpStream::connect(("127.0.0.1", to)) {
                    let pair = (client.try_clone(), server.try_clone());
                    if let (Ok(to_client), Ok(from_server)) = pair {
                        thread::spawn(move || forward(client, server, None));
                        let (replies, all) = (replies_of_all.clone(), all_forwarded.clone());
                        let of_server =
                            move || forward(from_server, to_client, Some((&replies, &all)));
                        thread::spawn(of_server);
                    }
                }
            }
        });
        Self {
            port,
            url,
            replies,
            forwarded,
        }
    }

    pub(crate) fn set_replies(&self, replies: Replies) {
        *self.replies.lock().unwrap() = replies;
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    #[cfg(feature = "redis")]
    pub(crate) fn forwarded(&self) -> usize {
        self.forwarded.load(Relaxed)
    }
}

fn forward(
    mut from: TcpStream,
    mut to: TcpStream,
    of_server: Option<(&Mutex<Replies>, &AtomicUsize)>,
) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let replies = of_server.map_or(Replies::Forward, |(replies, all)| {
            all.fetch_add(read, Relaxed);
            replies.lock().unwrap().clone()
        });
        let written = match replies {
            Replies::Forward => to.write_all(&buffer[..read]),
            Replies::Delay(delay) => {
                thread::sleep(delay);
                to.write_all(&buffer[..read])
            }
            Replies::Trickle(pause) => buffer[..read].iter().try_for_each(|byte| {
                thread::sleep(pause);
                to.write_all(&[*byte])
            }),
            Replies::Replace(other) => to.write_all(&other),
        };
        if written.is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
