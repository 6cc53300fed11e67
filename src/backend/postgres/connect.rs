//! The servers of a URL, and connections to them.

use std::collections::hash_map::RandomState;
use std::error::Error;
use std::hash::BuildHasher as _;
use std::str::Utf8Error;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Config, NoTls, Socket};

use super::connection::{Connection, milliseconds};
use super::failure::Failure;
use crate::backend::url::ConnectError;

const APPLICATION: &str = env!("CARGO_PKG_NAME");

/// A setting of a session by which it is known for the one that was asked for. No pooler knows it.
const TOKEN: &str = "workflow_context.session";

/// The servers that a URL names, and how to log in.
#[derive(Clone)]
pub(super) struct Target {
    config: Config,
    name: String,
    tls: Tls,
}

#[derive(Clone)]
enum Tls {
    None,
    #[cfg(feature = "postgres-tls")]
    Rustls(tokio_postgres_rustls::MakeRustlsConnect),
}

impl Target {
    /// Parses a URL. No error repeats it, since it may contain a password.
    pub(super) fn parse(url: &str) -> Result<Self, ConnectError> {
        let schemes = ["postgres://", "postgresql://"];
        let Some(rest) = schemes.iter().find_map(|scheme| url.strip_prefix(scheme)) else {
            return Err(invalid("scheme", "it does not begin with postgres://"));
        };
        // The parser takes all before the first @ for a user and a password, wherever it is.
        let (user, others) = rest.split_once('@').unwrap_or_default();
        if user.contains(['/', '?']) || others.contains('@') {
            let reason = "@, / and ? in a user or password have to be written as %40, %2F and %3F";
            return Err(invalid("user or password", reason));
        }
        let config = url.parse::<Config>();
        let mut config = config.map_err(|error| refused_by_parser(url, error))?;
        check_servers(&config)?;
        let tls = match config.get_ssl_mode() {
            SslMode::Require => required_tls()?,
            _ => {
                config.ssl_mode(SslMode::Disable);
                Tls::None
            }
        };
        if config.get_application_name().is_none() {
            config.application_name(APPLICATION);
        }
        let name = format!("PostgreSQL server {}", addresses(&config));
        Ok(Self { config, name, tls })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Opens a connection. With `own_session`, the session is to be the connection's own, and the server gives up its statements
    /// after that time.
    pub(super) async fn open(
        &self,
        most: Duration,
        own_session: Option<Duration>,
    ) -> Result<Connection, Failure> {
        // So that a server that does not answer leaves time for the next one.
        let servers = self.config.get_hosts().len().max(1) as u32;
        let mut config = self.config.clone();
        config.connect_timeout(most / servers);
        let Some(limit) = own_session else {
            return self.open_with(&config, None).await;
        };
        let token = format!("{:016x}", RandomState::new().hash_one(0));
        // A plan that was made while the table was small is used when it is large, so it has to use the index.
        let settings = format!(
            "-c default_transaction_isolation=read\\ committed -c statement_timeout={} -c enable_seqscan=off -c {TOKEN}={token}",
            milliseconds(limit),
        );
        let of_url = config.get_options().unwrap_or_default();
        let options = format!("{of_url} {settings}");
        config.options(options);
        let connection = self.open_with(&config, own_session).await?;
        let known = format!("SELECT current_setting('{TOKEN}', true) = '{token}'");
        let is_own = connection.query_typed(&known, &[]).await?;
        match is_own.first().and_then(|row| row.get(0)) {
            Some(true) => Ok(connection),
            _ => Err(Failure::SharedSession),
        }
    }

    async fn open_with(
        &self,
        config: &Config,
        own_session: Option<Duration>,
    ) -> Result<Connection, Failure> {
        match &self.tls {
            Tls::None => open_with(config, NoTls, own_session).await,
            #[cfg(feature = "postgres-tls")]
            Tls::Rustls(tls) => open_with(config, tls.clone(), own_session).await,
        }
    }
}

async fn open_with<T>(
    config: &Config,
    tls: T,
    own_session: Option<Duration>,
) -> Result<Connection, Failure>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let (client, connection) = config.connect(tls).await?;
    let task = tokio::spawn(async move {
        // Its error reaches whoever waits for an answer.
        let _ = connection.await;
    });
    Ok(Connection::new(client, task, own_session))
}

fn addresses(config: &Config) -> String {
    let ports = config.get_ports();
    let port = |at: usize| ports.get(at).or(ports.first()).copied().unwrap_or(5432);
    let hosts = config.get_hosts().iter().enumerate();
    let names: Vec<_> = hosts
        .map(|(at, host)| match host {
            Host::Tcp(host) => format!("{host}:{}", port(at)),
            #[cfg(unix)]
            Host::Unix(directory) => format!("{}:{}", directory.display(), port(at)),
        })
        .collect();
    if !names.is_empty() {
        return names.join(", ");
    }
    let addresses = config.get_hostaddrs().iter().enumerate();
    let names: Vec<_> = addresses
        .map(|(at, address)| format!("{address}:{}", port(at)))
        .collect();
    names.join(", ")
}

/// Checks what the client itself would only tell when it connects.
fn check_servers(config: &Config) -> Result<(), ConnectError> {
    let [hosts, addresses] = [config.get_hosts().len(), config.get_hostaddrs().len()];
    let (servers, ports) = (hosts.max(addresses), config.get_ports().len());
    if servers == 0 {
        return Err(invalid("host", "it names no host"));
    }
    if hosts.min(addresses) > 0 && hosts != addresses {
        let reason = format!("{hosts} hosts cannot have {addresses} addresses");
        return Err(invalid("host", reason));
    }
    if ports > 1 && ports != servers {
        let reason =
            format!("{servers} hosts cannot have {ports} ports, one belongs behind each host");
        return Err(invalid("port", reason));
    }
    Ok(())
}

fn refused_by_parser(url: &str, error: tokio_postgres::Error) -> ConnectError {
    let Some(reason) = error.into_source() else {
        return invalid("form", "it cannot be parsed");
    };
    if reason.is::<Utf8Error>() {
        return invalid("percent-encoding", reason);
    }
    // What follows an & in a password seems to be another parameter. The word may be encoded.
    let may_repeat_password = url.contains("password") || url.contains('%');
    match reason.to_string() {
        text if text.contains("`host`") => invalid("host", reason),
        text if text.contains("`port`") => invalid("port", reason),
        text if text.contains("unknown") && may_repeat_password => {
            invalid("parameters", "one of them is unknown")
        }
        _ => invalid("parameters", reason),
    }
}

fn invalid(part: &'static str, reason: impl Into<Box<dyn Error + Send + Sync>>) -> ConnectError {
    ConnectError::InvalidUrl {
        server: "PostgreSQL database",
        form: "postgres://user@127.0.0.1:5432/database",
        part,
        source: reason.into(),
    }
}

#[cfg(not(feature = "postgres-tls"))]
fn required_tls() -> Result<Tls, ConnectError> {
    let reason = "sslmode=require needs the feature postgres-tls";
    Err(invalid("parameters", reason))
}

#[cfg(feature = "postgres-tls")]
fn required_tls() -> Result<Tls, ConnectError> {
    use std::sync::Arc;

    use rustls::crypto::{CryptoProvider, ring};
    use rustls::{ClientConfig, RootCertStore};

    let mut roots = RootCertStore::empty();
    // Without any root, no certificate is trusted, and connecting says so.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = CryptoProvider::get_default().cloned();
    let provider = provider.unwrap_or_else(|| Arc::new(ring::default_provider()));
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid("parameters", error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Tls::Rustls(tokio_postgres_rustls::MakeRustlsConnect::new(
        config,
    )))
}
