#![no_main]

#[path = "../../tests/it/fuzzed"]
mod fuzzed {
    pub(crate) mod redb_file;
}

libfuzzer_sys::fuzz_target!(init: spare_redb(), |data: &[u8]| fuzzed::redb_file::redb_file(data));

/// libFuzzer's hook aborts at each panic, and the crate turns those of redb into errors. One that it lets through still ends
/// the process.
fn spare_redb() {
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map_or("", |it| it.file());
        if !place.contains("/redb-") {
            abort(panic);
        }
    }));
}
