//! Damaged files of `RedbBackend`.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use tracing_workflow_context::backend::{Record, StorageBackend as _, Write};
use tracing_workflow_context::{RedbBackend, WorkflowContext};

fn record(span: u64) -> Record {
    let text = format!("00-0af7651916cd43dd8448eb211c80319c-{span:016x}-01");
    let context = WorkflowContext::parse(&text, "").expect("well formed");
    Record::new(context, SystemTime::now() + Duration::from_secs(1_000_000))
}

fn file() -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // In memory where there is such a place: a damaged file is opened thousands of times a second.
    let memory = PathBuf::from("/dev/shm");
    let directory = match memory.is_dir() {
        true => memory,
        false => std::env::temp_dir(),
    };
    let name = format!(
        "workflow-context-fuzz-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Relaxed)
    );
    directory.join(name)
}

/// A file with twenty records.
fn image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let path = file();
        let backend = RedbBackend::open(&path).expect("a new file");
        let puts = (1..21).map(|span| Write::Put(span.to_string(), record(span)));
        backend.write(&puts.collect::<Vec<_>>()).expect("it works");
        drop(backend);
        let image = std::fs::read(&path).expect("it is there");
        std::fs::remove_file(&path).expect("it is there");
        image
    })
}

/// The magic of redb 4 (`src/tree_store/page_store/header.rs`).
const MAGIC: &[u8] = b"redb\x1A\x0A\xA9\x0D\x0A";

/// The input changes a sound file: three bytes are a place, the next one is written there. A place beyond the end cuts the file.
/// An input that begins with the magic of redb is a file of its own.
pub(crate) fn redb_file(data: &[u8]) {
    let mut content = image().to_vec();
    if data.starts_with(b"redb") {
        content = data.to_vec();
    } else {
        for change in data.chunks_exact(4).take(64) {
            let [high, middle, low, byte] = *change else {
                continue;
            };
            let place = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            match content.get_mut(place) {
                Some(there) => *there = byte,
                None => content.truncate(place % (content.len() + 1)),
            }
        }
    }
    let path = file();
    std::fs::write(&path, &content).expect("room");
    struct Removed<'a>(&'a PathBuf);
    impl Drop for Removed<'_> {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(self.0);
        }
    }
    let _removed = Removed(&path);
    match RedbBackend::open(&path) {
        Err(_) => {
            let now = std::fs::read(&path).expect("it is there");
            // Before redb finds damage in a page of a file of its own, it may clear some of the flags after the magic.
            if let (true, Some(&left)) = (content.starts_with(MAGIC), now.get(MAGIC.len())) {
                content[MAGIC.len()] &= left;
            }
            assert!(now == content, "a file that is refused is left as it was");
        }
        Ok(backend) => {
            let mut found = 0;
            let _ = backend.scan(&mut |_, _| found += 1);
            for key in ["1", "20", "none"] {
                let _ = backend.get(key);
            }
            let puts = [
                Write::Put("1".to_owned(), record(77)),
                Write::Remove("2".to_owned()),
            ];
            // What redb itself believes of a damaged tree is its own; here nothing may panic, hang or grow.
            let _ = backend.write(&puts);
            let _ = backend.flush();
        }
    }
}
