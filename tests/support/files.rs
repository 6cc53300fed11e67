//! Temporary files.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A new directory, which is removed with everything in it when this is dropped.
#[derive(Debug)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "workflow-context-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a directory for temporary files");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Opens a file of contexts, also right after a [`Worker`](super::Worker) on it was dropped, whose subscriber may live for a moment
/// longer; see [`Worker::close`](super::Worker::close).
#[cfg(feature = "redb")]
pub(crate) fn open(path: &Path) -> tracing_workflow_context::RedbBackend {
    use tracing_workflow_context::{OpenError, RedbBackend};

    let deadline = std::time::Instant::now() + super::PATIENCE;
    loop {
        match RedbBackend::open(path) {
            Err(OpenError::Locked { .. }) if std::time::Instant::now() < deadline => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            opened => return opened.expect("a file of contexts"),
        }
    }
}

/// A file system in memory, until this is dropped.
#[derive(Debug)]
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// Mounts one there; `None` where that is not allowed.
    pub(crate) fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        let args = ["-t", "tmpfs", "-o", options, "tmpfs"];
        run_mount("mount", &args, at).then(|| Self(at.to_owned()))
    }

    pub(crate) fn change(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(run_mount("mount", &["-o", &options], &self.0));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run_mount("umount", &["-l"], &self.0);
    }
}

fn run_mount(program: &str, args: &[&str], at: &Path) -> bool {
    let output = Command::new(program).args(args).arg(at).output();
    output.is_ok_and(|output| output.status.success())
}
