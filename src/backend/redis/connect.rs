//! Clients from URLs and addresses; they connect to nothing yet.

use redis::{
    Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, RedisError, RedisResult,
};

use crate::backend::url::ConnectError;

const SCHEMES: [&str; 7] = [
    "redis",
    "rediss",
    "valkey",
    "valkeys",
    "redis+unix",
    "valkey+unix",
    "unix",
];

pub(super) fn client(url: &str) -> Result<Client, ConnectError> {
    let invalid = |source: RedisError| ConnectError::InvalidUrl {
        server: "Redis server",
        form: "redis://127.0.0.1:6379/",
        part: wrong_part(url, &source.to_string()),
        source: source.into(),
    };
    let info = connection_info(url).map_err(invalid)?;
    #[cfg(feature = "redis-tls")]
    if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        ensure_crypto_provider();
    }
    Client::open(info).map_err(invalid)
}

/// Parses a URL. Refuses what the client would refuse later, and repeats no part of it.
fn connection_info(url: &str) -> RedisResult<ConnectionInfo> {
    let refused = |reason| RedisError::from((ErrorKind::InvalidClientConfig, reason));
    let info = url
        .into_connection_info()
        .map_err(|error| match error.detail() {
            Some(_) => refused("invalid value of a parameter, such as an unknown protocol"),
            None => error,
        })?;
    match info.addr() {
        ConnectionAddr::TcpTls { insecure: true, .. } => Err(refused(
            "the fragment #insecure is not supported: certificates are always verified",
        )),
        _ => Ok(info),
    }
}

/// Returns the part of a URL that an error of its parser is about.
fn wrong_part(url: &str, error: &str) -> &'static str {
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    if scheme.is_none_or(|scheme| !SCHEMES.contains(&scheme)) {
        return "scheme";
    }
    let parts = [
        ("TLS", "scheme"),
        ("did not parse", "host"),
        ("host", "host"),
        ("address", "host"),
        ("database", "database"),
        ("path", "host"),
        ("Username", "user or password"),
        ("Password", "user or password"),
        ("protocol", "parameters"),
        ("fragment", "fragment"),
    ];
    let part = parts.iter().find(|(word, _)| error.contains(word));
    part.map_or("form", |(_, part)| part)
}

/// Creates a client of another address with all other settings of `client`.
pub(super) fn with_address(client: &Client, host: String, port: u16) -> RedisResult<Client> {
    let info = client.get_connection_info();
    let address = match info.addr().clone() {
        ConnectionAddr::TcpTls {
            insecure,
            tls_params,
            ..
        } => ConnectionAddr::TcpTls {
            host,
            port,
            insecure,
            tls_params,
        },
        _ => ConnectionAddr::Tcp(host, port),
    };
    Client::open(info.clone().set_addr(address))
}

/// Installs `ring` for rustls, which panics if the process has chosen nothing and several providers are linked.
#[cfg(feature = "redis-tls")]
fn ensure_crypto_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // If another thread was faster, its choice stands.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}
