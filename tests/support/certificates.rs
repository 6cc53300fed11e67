//! Certificates for servers of tests.

use std::path::Path;
use std::process::Command;

/// Creates a directory with a certificate authority and a server certificate that it signed.
pub(crate) fn make_authority(directory: &Path) -> String {
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
