//! Workers in Python read and write the same rows with their own client.

use tracing_workflow_context::{Form, WorkflowContextStorage};

use super::*;

fn storage(server: &PostgresServer) -> WorkflowContextStorage {
    let backend = backend(server).with_form(Form::Json);
    // Python expects the table.
    StorageBackend::connect(&backend).unwrap();
    patient(backend).build().expect("sound settings")
}

#[test]
fn python_reads_a_context_recorded_by_a_span() {
    let server = PostgresServer::start();
    assert_python_reads_a_context_recorded_by_a_span(&server.url(), storage(&server));
}

#[test]
fn a_span_continues_a_context_recorded_by_python() {
    let server = PostgresServer::start();
    assert_a_span_continues_a_context_recorded_by_python(&server.url(), storage(&server));
}

#[test]
fn the_first_writer_wins_in_either_language() {
    let server = PostgresServer::start();
    assert_the_first_writer_wins_in_either_language(&server.url(), storage(&server));
}
