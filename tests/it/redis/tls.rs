//! Connections by TLS: the server's certificate is verified.

use std::time::{Duration, Instant};

use tracing_workflow_context::RedisBackend;

use super::*;

/// The environment variable with URL, kind of server and expected trust, for a process with its own certificates.
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
            let status = test_process(module_path!(), "one_process_by_tls")
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
        // A Cluster refuses writes for a moment after its start.
        while backend
            .write_all(&[claim("first", &record(PARENT))])
            .is_err()
        {
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
                .write_all(&writes)
                .unwrap()
                .iter()
                .all(|o| o.existing().is_none())
        );
        assert!(
            backend
                .write_all(&writes)
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
