//! AWS's emulator of the service, `dex-local-runner`, and what is asked of it.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use crate::functions::{ORDER, RECEIPT};
use crate::{ORDERS, Result};

pub const REGION: &str = "eu-central-1";
pub const ACCOUNT: &str = "123456789012";

/// What AWS's clients want before they send anything.
pub const CREDENTIALS: [(&str, &str); 4] = [
    ("AWS_ACCESS_KEY_ID", "nobody"),
    ("AWS_SECRET_ACCESS_KEY", "nothing"),
    ("AWS_REGION", REGION),
    ("AWS_DEFAULT_REGION", REGION),
];

/// How long the emulator may take to start, and all orders until they are done.
const PATIENCE: Duration = Duration::from_secs(300);

pub struct Emulator {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Emulator {
    /// Starts it, with functions behind the Invoke API on `lambda_port`.
    pub fn start(program: &str, port: u16, lambda_port: u16, dir: &Path) -> Result<Self> {
        let durable =
            json!({ "DurableConfig": { "ExecutionTimeout": 300, "RetentionPeriodInDays": 1 } });
        let functions = json!({ ORDER: durable, RECEIPT: durable }).to_string();
        let log = dir.join("emulator.log");
        let written = File::create(&log)?;
        let url = |port| format!("http://127.0.0.1:{port}");
        let process = Command::new(program)
            .args(["start-server", "--log-level", "WARNING"])
            .args(["--host", "127.0.0.1"])
            .args(["--port", &port.to_string()])
            .args(["--lambda-endpoint", &url(lambda_port)])
            .args(["--local-runner-endpoint", &url(port)])
            .args(["--local-runner-region", REGION])
            .args(["--function-configs", &functions])
            .envs(CREDENTIALS)
            .stdin(Stdio::null())
            .stdout(written.try_clone()?)
            .stderr(written)
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        let mut emulator = Self { process, port, log };
        let deadline = Instant::now() + PATIENCE;
        while emulator.get("health").is_err() {
            if let Some(status) = emulator.process.try_wait()? {
                return Err(emulator.with_log(&format!("the emulator ended: {status}")));
            }
            if Instant::now() > deadline {
                return Err(emulator.with_log("the emulator does not answer"));
            }
            sleep(Duration::from_millis(50));
        }
        Ok(emulator)
    }

    /// Starts an execution of a function, by a name.
    pub fn start_execution(&self, function: &str, name: &str) -> Result<()> {
        let start = json!({
            "AccountId": ACCOUNT,
            "FunctionName": function,
            "FunctionQualifier": "$LATEST",
            "ExecutionName": name,
            "ExecutionTimeoutSeconds": 300,
            "ExecutionRetentionPeriodDays": 1,
            "InvocationId": name,
            "Input": json!(name).to_string(),
        });
        post(self.port, "start-durable-execution", &start.to_string())
    }

    /// Waits until each order has succeeded with its receipt, or anything has failed.
    pub fn wait_for_all(&self, failure: impl Fn() -> Option<String>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(failure) = failure() {
                return Err(self.with_log(&failure));
            }
            let all = self.get("2025-12-01/durable-executions")?;
            let all: Value = serde_json::from_str(&all)?;
            let all = all["DurableExecutions"].as_array();
            let statuses: Vec<_> = all
                .into_iter()
                .flatten()
                .filter_map(|execution| execution["Status"].as_str())
                .collect();
            let is_over = statuses.iter().all(|status| *status == "SUCCEEDED");
            if is_over && statuses.len() == 2 * ORDERS.len() {
                return Ok(());
            }
            let is_known = |status: &&str| ["RUNNING", "SUCCEEDED"].contains(status);
            if !statuses.iter().all(is_known) || Instant::now() > deadline {
                return Err(self.with_log(&format!("not as expected: {statuses:?}")));
            }
            sleep(Duration::from_millis(50));
        }
    }

    fn get(&self, path: &str) -> Result<String> {
        let url = format!("http://127.0.0.1:{}/{path}", self.port);
        let mut answer = ureq::get(&url).call()?;
        Ok(answer.body_mut().read_to_string()?)
    }

    fn with_log(&self, error: &str) -> Box<dyn std::error::Error + Send + Sync> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        eprintln!("{log}\nengine-aws: above is the emulator's log");
        error.into()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Completes a callback.
pub fn approve(port: u16, callback: &str) -> Result<()> {
    let id = utf8_percent_encode(callback, NON_ALPHANUMERIC);
    let path = format!("2025-12-01/durable-execution-callbacks/{id}/succeed");
    post(port, &path, "true")
}

fn post(port: u16, path: &str, body: &str) -> Result<()> {
    let url = format!("http://127.0.0.1:{port}/{path}");
    let request = ureq::post(&url).header("content-type", "application/json");
    request.send(body)?;
    Ok(())
}

pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}
