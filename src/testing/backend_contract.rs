//! The contract of a backend as a suite of checks, for any implementation.

mod checked;
mod concurrency;
mod records;
mod writes;

use std::sync::Arc;

use self::checked::Checked;
use crate::backend::StorageBackend;

/// Checks a backend against the contract of [`StorageBackend`], except for durability when a process or a machine dies.
///
/// `make` is called once for each of about twenty checks, and returns an empty backend each time. Together they take a
/// few seconds, since some wait for records to expire.
///
/// ```
/// use tracing_workflow_context::MemoryBackend;
/// use tracing_workflow_context::testing::check_backend;
///
/// check_backend(MemoryBackend::new);
/// ```
///
/// # Panics
///
/// If the backend breaks a rule, with a sentence that names it.
pub fn check_backend<B: StorageBackend>(make: impl Fn() -> B) {
    let checks: [fn(&Checked<B>); 19] = [
        writes::an_empty_backend_has_no_records,
        writes::put_replaces_any_other_record,
        writes::put_if_absent_stores_only_if_there_is_no_record,
        writes::remove_removes_one_record,
        writes::expire_changes_the_expiry_of_an_existing_record,
        writes::each_write_has_its_outcome,
        writes::writes_on_one_key_keep_their_order,
        writes::a_large_group_is_written,
        records::any_text_is_a_key,
        records::a_record_comes_back_as_it_was,
        records::an_expired_record_is_gone,
        records::a_record_exists_until_it_expires,
        records::an_expired_record_can_be_replaced,
        concurrency::scan_visits_every_record_once,
        concurrency::scan_holds_no_lock_while_visit_runs,
        concurrency::scan_visits_every_record_that_stays_while_others_come_and_go,
        concurrency::one_of_concurrent_claims_wins,
        concurrency::concurrent_writes_are_atomic,
        concurrency::flush_loses_nothing,
    ];
    for check in checks {
        let backend = Checked(Arc::new(make()));
        check(&backend);
        backend.has_read_nothing_malformed();
    }
}
