//! A server by TLS: its certificate is checked.

use std::path::Path;
use std::process::Command;

use tracing_workflow_context::{RedisBackend, StorageBackend as _};

use super::{Directory, PARENT, PATIENCE, RedisServer, claim, record};

/// The URL, and whether the server is to be trusted, for a process with certificates of its own.
const TLS: &str = "WORKFLOW_CONTEXT_TLS";

#[test]
fn a_server_is_trusted_by_its_certificate() {
    let directory = Directory::new();
    let authority = [0, 1].map(|n| make_authority(&directory.file(&n.to_string())));
    let file = |name: &str| format!("{}/{name}", authority[0]);
    let (_server, port) = RedisServer::start_with_tls(&file("server.pem"), &file("server.key"));
    let url = format!("rediss://127.0.0.1:{port}/");
    for (authority, trusted) in authority.iter().zip(["trusted", "unknown"]) {
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args(["tls::one_process_by_tls", "--exact", "--ignored"])
            .env(TLS, format!("{url} {trusted}"))
            .env("SSL_CERT_FILE", format!("{authority}/authority.pem"))
            .env_remove("SSL_CERT_DIR")
            .status();
        assert!(
            status.expect("this program can be run").success(),
            "{trusted}"
        );
    }
}

#[test]
#[ignore = "run by a_server_is_trusted_by_its_certificate"]
fn one_process_by_tls() {
    let Ok(tls) = std::env::var(TLS) else {
        return;
    };
    let (url, trusted) = tls.split_once(' ').expect("two words");
    let backend = RedisBackend::connect(url).expect("a URL");
    let backend = backend
        .with_connect_timeout(PATIENCE)
        .with_response_timeout(PATIENCE);
    if trusted == "trusted" {
        let writes: Vec<_> = (0..1000)
            .map(|n| claim(&n.to_string(), &record(PARENT)))
            .collect();
        assert!(backend.write(&writes).unwrap().iter().all(Option::is_none));
        assert!(backend.write(&writes).unwrap().iter().all(Option::is_some));
        assert!(backend.get("999").unwrap().is_some());
    } else {
        assert!(backend.flush().is_err());
        assert!(backend.get("1").is_err());
    }
}

/// A directory with an authority, and a server that it vouches for.
fn make_authority(directory: &Path) -> String {
    let script = r#"
        set -e
        mkdir "$0"
        cd "$0"
        exec 2>log
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=authority" -keyout authority.key -out authority.pem
        openssl req -newkey rsa:2048 -nodes -subj "/CN=server" -keyout server.key -out server.csr
        echo "subjectAltName=IP:127.0.0.1" >extensions
        openssl x509 -req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 2 \
            -extfile extensions -out server.pem
    "#;
    let status = Command::new("bash")
        .args(["-c", script])
        .arg(directory)
        .status();
    assert!(
        status.expect("bash can be run").success(),
        "openssl makes certificates, see {}/log; install openssl if it is missing",
        directory.display()
    );
    directory.display().to_string()
}
