//! The servers of a URL, and connections to them.

use std::error::Error;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, NoTls, Socket};

use super::failure::Failure;
use crate::backend::BackendError;

const APPLICATION: &str = env!("CARGO_PKG_NAME");

/// The servers that a URL names, and how to log in.
pub(super) struct Target {
    config: Config,
    name: String,
    tls: Tls,
}

enum Tls {
    None,
    #[cfg(feature = "postgres-tls")]
    Rustls(tokio_postgres_rustls::MakeRustlsConnect),
}

impl Target {
    /// Parses a URL. No error repeats it, since it may contain a password.
    pub(super) fn parse(url: &str) -> Result<Self, BackendError> {
        if !["postgres://", "postgresql://"]
            .iter()
            .any(|scheme| url.starts_with(scheme))
        {
            return Err(invalid("it does not begin with postgres://", None));
        }
        // The parser would take the rest of the password for a host.
        if url.matches('@').count() > 1 {
            return Err(invalid("an @ in it has to be written as %40", None));
        }
        let config = url.parse::<Config>();
        let mut config = config.map_err(|error| {
            let reason = error.into_source();
            let text = reason.as_ref().map(ToString::to_string);
            invalid(text.as_deref().unwrap_or("it cannot be parsed"), reason)
        })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(invalid("it names no host", None));
        }
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

    /// Opens a connection. Returns its client, and a handle that closes it.
    pub(super) async fn open(&self, most: Duration) -> Result<(Client, AbortHandle), Failure> {
        // So that a server that does not answer leaves time for the next one.
        let servers = self.config.get_hosts().len().max(1) as u32;
        let mut config = self.config.clone();
        config.connect_timeout(most / servers);
        match &self.tls {
            Tls::None => open_with(&config, NoTls).await,
            #[cfg(feature = "postgres-tls")]
            Tls::Rustls(tls) => open_with(&config, tls.clone()).await,
        }
    }
}

async fn open_with<T>(config: &Config, tls: T) -> Result<(Client, AbortHandle), Failure>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let (client, connection) = config.connect(tls).await?;
    let connection = tokio::spawn(async move {
        // Its error reaches whoever waits for an answer.
        let _ = connection.await;
    });
    Ok((client, connection.abort_handle()))
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

fn invalid(reason: &str, source: Option<Box<dyn Error + Send + Sync>>) -> BackendError {
    let message = format!(
        "invalid URL of a PostgreSQL database, expected a form like postgres://user@127.0.0.1:5432/database: {reason}"
    );
    BackendError::new(message, source)
}

#[cfg(not(feature = "postgres-tls"))]
fn required_tls() -> Result<Tls, BackendError> {
    Err(invalid(
        "sslmode=require needs the feature postgres-tls",
        None,
    ))
}

#[cfg(feature = "postgres-tls")]
fn required_tls() -> Result<Tls, BackendError> {
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
        .map_err(|error| invalid("TLS cannot be set up", Some(error.into())))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Tls::Rustls(tokio_postgres_rustls::MakeRustlsConnect::new(
        config,
    )))
}
