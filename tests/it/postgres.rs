//! Workers that share one table of a PostgreSQL database agree, whatever happens to the server.

use std::cell::RefCell;

use crate::support::*;
use tracing_workflow_context::testing::check_backend;
use tracing_workflow_context::{Form, PostgresBackend};

fn backend(server: &PostgresServer) -> PostgresBackend {
    backend_at(&server.url())
}

fn backend_at(url: &str) -> PostgresBackend {
    let backend = PostgresBackend::connect(url).expect("a URL");
    backend.connect_timeout(PATIENCE).response_timeout(PATIENCE)
}

/// Runs the contract suite, with a new table for each backend.
fn assert_fulfils_the_contract(form: Form, connect: impl Fn() -> PostgresBackend) {
    let numbers = RefCell::new(0..);
    check_backend(|| {
        let number: u32 = numbers.borrow_mut().next().expect("endless");
        let name = format!("a \"table\"; --{number}");
        connect().with_form(form).table(&name)
    });
}

#[test]
fn postgres_fulfils_the_contract() {
    for form in [Form::Binary, Form::Json] {
        let server = PostgresServer::start();
        assert_fulfils_the_contract(form, || backend(&server));
    }
}

#[test]
fn postgres_behind_pgbouncer_fulfils_the_contract() {
    let server = PostgresServer::start();
    let pooler = PgBouncer::before(&server, 3);
    assert_fulfils_the_contract(Form::Json, || backend_at(pooler.url()));
}
