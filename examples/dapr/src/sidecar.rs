//! `sidecar.py` as a child process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::Result;

/// Ends when dropped, or with this process however that ends: the script waits for the end of its standard input.
pub(crate) struct Sidecar {
    process: Child,
    pub(crate) address: String,
}

impl Sidecar {
    pub(crate) fn start(python: &Path) -> Result<Self> {
        let mut process = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/sidecar.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", python.display()))?;
        let mut line = String::new();
        let stdout = process.stdout.take().ok_or("the sidecar has no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let port: u16 = line
            .trim()
            .parse()
            .map_err(|_| "the sidecar told no port")?;
        let address = format!("http://127.0.0.1:{port}");
        Ok(Self { process, address })
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
