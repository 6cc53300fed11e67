//! Connections by TLS: the certificate of the server is verified.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// The environment variable with URL and expected trust, for a process with its own certificates.
const TLS: &str = "WORKFLOW_CONTEXT_POSTGRES_TLS";

#[test]
fn a_server_is_trusted_by_its_certificate() {
    let directory = Directory::new();
    let authority = [0, 1].map(|n| make_authority(&directory.file(&n.to_string())));
    let certificate = |name: &str| fs::read(format!("{}/{name}", authority[0])).expect("a file");
    let server = PostgresServer::start_on(&["ssl=on"], |data| {
        for name in ["server.crt", "server.key"] {
            let of = name.replace("crt", "pem");
            let file = data.join(name);
            fs::write(&file, certificate(&of)).expect("a file");
            // The server refuses a key that others may read.
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("a file");
        }
    });
    let url = format!("{}?sslmode=require", server.url());
    for (authority, trusted) in authority.iter().zip(["trusted", "unknown"]) {
        let status = test_process(module_path!(), "one_process_by_tls")
            .env(TLS, format!("{url} {trusted}"))
            .env("SSL_CERT_FILE", format!("{authority}/authority.pem"))
            .env_remove("SSL_CERT_DIR")
            .status();
        assert!(
            status.expect("this program can be run").success(),
            "{trusted}"
        );
    }
    // Of a host with another name.
    let other = url.replace("127.0.0.1", "localhost");
    let status = test_process(module_path!(), "one_process_by_tls")
        .env(TLS, format!("{other} unknown"))
        .env("SSL_CERT_FILE", format!("{}/authority.pem", authority[0]))
        .env_remove("SSL_CERT_DIR")
        .status();
    assert!(status.expect("this program can be run").success());
}

#[test]
#[ignore = "run by a_server_is_trusted_by_its_certificate"]
fn one_process_by_tls() {
    let Ok(tls) = std::env::var(TLS) else {
        return;
    };
    let (url, trusted) = tls.split_once(' ').expect("two words");
    let backend = backend_at(url);
    if trusted == "trusted" {
        backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
        assert!(backend.get("id").unwrap().is_some());
    } else {
        let error = backend.get("id").unwrap_err();
        assert!(
            text_of(&error).contains("certificate"),
            "{}",
            text_of(&error)
        );
    }
}
