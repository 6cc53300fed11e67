//! A server that speaks as much of the protocol of Redis as a record needs, and says whatever a test wants.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

#[derive(Default)]
struct Says {
    /// The value of every key.
    value: Vec<u8>,
    /// What is said instead of any reply, before the connection is closed.
    raw: Option<Vec<u8>>,
}

/// It runs until the process ends.
pub(crate) struct FakeRedis {
    port: u16,
    says: Arc<Mutex<Says>>,
}

impl FakeRedis {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let says: Arc<Mutex<Says>> = Arc::default();
        let of_server = says.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let says = of_server.clone();
                thread::spawn(move || serve(client, &says));
            }
        });
        Self { port, says }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub(crate) fn set_value(&self, value: &[u8]) {
        self.says.lock().unwrap().value = value.to_owned();
    }

    /// Returns the value that a client has set last.
    pub(crate) fn value(&self) -> Vec<u8> {
        self.says.lock().unwrap().value.clone()
    }

    pub(crate) fn say(&self, raw: &[u8]) {
        self.says.lock().unwrap().raw = Some(raw.to_owned());
    }
}

fn serve(mut client: TcpStream, says: &Mutex<Says>) {
    let _ = client.set_nodelay(true);
    let (mut received, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    while let Ok(read @ 1..) = client.read(&mut buffer) {
        received.extend_from_slice(&buffer[..read]);
        let mut replies = Vec::new();
        while let Some((command, length)) = first_command(&received) {
            received.drain(..length);
            let mut says = says.lock().unwrap();
            if let Some(raw) = &says.raw {
                let _ = client.write_all(raw);
                return;
            }
            match &*command[0] {
                b"GETRANGE" => {
                    replies.extend(format!("${}\r\n", says.value.len()).into_bytes());
                    replies.extend(&says.value);
                    replies.extend(b"\r\n");
                }
                b"PTTL" => replies.extend(b":-1\r\n"),
                b"SET" => {
                    says.value.clone_from(&command[2]);
                    replies.extend(b"+OK\r\n");
                }
                _ => replies.extend(b"+PONG\r\n"),
            }
        }
        if client.write_all(&replies).is_err() {
            return;
        }
    }
}

/// Returns the first command, and its length, once all of it has come.
fn first_command(received: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let mut at = 0;
    let number = |at: &mut usize| {
        let line = &received[*at..];
        let end = line.windows(2).position(|two| two == b"\r\n")?;
        let number = std::str::from_utf8(&line[1..end]).expect("a client's number");
        *at += end + 2;
        Some(number.parse::<usize>().expect("a client's number"))
    };
    let arguments = number(&mut at)?;
    let mut command = Vec::new();
    for _ in 0..arguments {
        let length = number(&mut at)?;
        command.push(received.get(at..at + length)?.to_owned());
        at += length + 2;
    }
    (at <= received.len()).then_some((command, at))
}
