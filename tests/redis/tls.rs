//! A server by TLS: its certificate is checked.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tracing_workflow_context::RedisBackend;
use tracing_workflow_context::backend::StorageBackend as _;

use super::{Directory, PARENT, PATIENCE, RedisServer, claim, is_written, raw, record};

/// The URL, what is there, and whether it is to be trusted, for a process with certificates of its own.
const TLS: &str = "WORKFLOW_CONTEXT_TLS";

#[test]
fn a_server_is_trusted_by_its_certificate() {
    let directory = Directory::new();
    let authority = [0, 1].map(|n| make_authority(&directory.file(&n.to_string())));
    let file = |name: &str| format!("{}/{name}", authority[0]);
    let (certificate, key) = (file("server.pem"), file("server.key"));
    let single = RedisServer::start_with_tls(&certificate, &key);
    let cluster = RedisServer::start_in_cluster_with_tls(&certificate, &key);
    let mut share = redis::cmd("CLUSTER");
    share.arg("ADDSLOTSRANGE").arg(0).arg(16_383);
    let () = share
        .query(&mut raw(&cluster.0))
        .expect("it takes all slots");
    for ((_server, port), kind) in [(&single, "single"), (&cluster, "cluster")] {
        let url = format!("rediss://127.0.0.1:{port}/");
        for (authority, trusted) in authority.iter().zip(["trusted", "unknown"]) {
            let status = Command::new(std::env::current_exe().expect("this program"))
                .args(["tls::one_process_by_tls", "--exact", "--ignored"])
                .env(TLS, format!("{url} {kind} {trusted}"))
                .env("SSL_CERT_FILE", format!("{authority}/authority.pem"))
                .env_remove("SSL_CERT_DIR")
                .status();
            assert!(
                status.expect("this program can be run").success(),
                "{kind}, {trusted}"
            );
        }
    }
}

#[test]
#[ignore = "run by a_server_is_trusted_by_its_certificate"]
fn one_process_by_tls() {
    let Ok(tls) = std::env::var(TLS) else {
        return;
    };
    let words: Vec<_> = tls.split(' ').collect();
    let [url, kind, trusted] = words[..] else {
        panic!("{words:?}")
    };
    let backend = match kind {
        "cluster" => RedisBackend::connect_cluster([url]),
        _ => RedisBackend::connect(url),
    };
    let backend = backend
        .expect("a URL")
        .with_connect_timeout(PATIENCE)
        .with_response_timeout(PATIENCE);
    if trusted == "trusted" {
        let deadline = Instant::now() + PATIENCE;
        // A Cluster takes nothing for a moment after its start.
        while !is_written(&backend, &[claim("first", &record(PARENT))]) {
            assert!(
                Instant::now() < deadline,
                "it is written to within {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let writes: Vec<_> = (0..1000)
            .map(|n| claim(&n.to_string(), &record(PARENT)))
            .collect();
        assert!(
            backend
                .write(&writes)
                .unwrap()
                .iter()
                .all(|o| o.existing().is_none())
        );
        assert!(
            backend
                .write(&writes)
                .unwrap()
                .iter()
                .all(|o| o.existing().is_some())
        );
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
