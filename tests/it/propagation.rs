//! Outgoing headers follow W3C Trace Context level 2, and incoming ones are parsed strictly by it.
//!
//! The crate is compared with three references: the specification, as tables of its rules; the vectors of its own test suite
//! (<https://github.com/w3c/trace-context/tree/main/test>); and the OpenTelemetry SDK's propagator, wherever that one
//! goes by the rules. Where it does not, [`SDK_READS`] and the tests beside it name the case.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer, TracerProvider,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use tracing::info_span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{ParseContextError, WorkflowContext, WorkflowContextStorage};

use crate::support::Worker;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";
const SENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

// traceparent: the rules

/// Valid traceparents, and how each is written again.
#[rustfmt::skip]
const READ: [(&str, &str); 17] = [
    (SENT, SENT),
    // Flags: sampled and random are kept, all others are set to zero.
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02"),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03"),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-04", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-fe", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02"),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03"),
    // Ids with a single bit set, and with all of them.
    ("00-00000000000000000000000000000001-8000000000000000-01", "00-00000000000000000000000000000001-8000000000000000-01"),
    ("00-80000000000000000000000000000000-0000000000000001-01", "00-80000000000000000000000000000000-0000000000000001-01"),
    ("00-ffffffffffffffffffffffffffffffff-ffffffffffffffff-01", "00-ffffffffffffffffffffffffffffffff-ffffffffffffffff-01"),
    // Later versions, with whatever follows behind a dash.
    ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", SENT),
    ("fe-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", SENT),
    ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-", SENT),
    ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what the-FUTURE will be liké", SENT),
    // Blanks around it.
    (" 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", SENT),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\t", SENT),
    ("\t \t01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 \t ", SENT),
];

/// Invalid traceparents, and the error for each.
#[rustfmt::skip]
const REFUSED: [(&str, ParseContextError); 34] = [
    ("", ParseContextError::Length),
    (" \t ", ParseContextError::Length),
    ("00", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1", ParseContextError::Length),
    ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1 ", ParseContextError::Length),
    // Version 00 has nothing behind its flags.
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-xyz", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-011", ParseContextError::Length),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n", ParseContextError::Length),
    // Two in one, as some frameworks join headers.
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01,00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Length),
    ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.xyz", ParseContextError::Delimiter),
    ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-011", ParseContextError::Delimiter),
    ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 -", ParseContextError::Delimiter),
    ("00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01", ParseContextError::Delimiter),
    ("00-4bf92f3577b34da6a3ce929d0e0e473600f067aa0ba902b7-01xx", ParseContextError::Delimiter),
    ("0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-011", ParseContextError::Delimiter),
    ("000-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Delimiter),
    ("\n00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Delimiter),
    // Digits are hex and lower case.
    ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", ParseContextError::Digit),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00F067AA0BA902B7-01", ParseContextError::Digit),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0A", ParseContextError::Digit),
    ("CC-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Digit),
    ("FF-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Digit),
    ("00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Digit),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-+0f067aa0ba902b7-01", ParseContextError::Digit),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-+1", ParseContextError::Digit),
    ("0x-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Digit),
    ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseContextError::Version),
    ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-xyz", ParseContextError::Version),
    ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", ParseContextError::ZeroTraceId),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", ParseContextError::ZeroSpanId),
];

#[test]
fn a_valid_traceparent_is_parsed() {
    for (value, written) in READ {
        let cx =
            WorkflowContext::parse(value, "").unwrap_or_else(|error| panic!("{value:?}: {error}"));
        assert_eq!(cx.traceparent(), written, "{value:?}");
        assert_eq!(cx.is_sampled(), written.ends_with(['1', '3']), "{value:?}");
        assert!(
            is_valid_by_specification(value),
            "the test's own reading of {value:?}"
        );
    }
}

#[test]
fn an_invalid_traceparent_is_refused() {
    for (value, why) in REFUSED {
        assert_eq!(WorkflowContext::parse(value, "a=1"), Err(why), "{value:?}");
        assert!(
            !is_valid_by_specification(value),
            "the test's own reading of {value:?}"
        );
    }
}

#[test]
fn a_parsed_context_has_accessors() {
    let before = SystemTime::now();
    let cx = WorkflowContext::parse(SENT, "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE").unwrap();
    assert_eq!(cx.trace_id(), TraceId::from_hex(TRACE).unwrap());
    assert_eq!(cx.span_id(), SpanId::from_hex(SPAN).unwrap());
    assert_eq!(cx.tracestate(), "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE");
    assert!(cx.is_sampled() && !cx.is_resumed());
    // The clock may be coarser than the nanoseconds in which the time is kept, never finer.
    assert!((before..=SystemTime::now()).contains(&cx.recorded_at()));
}

#[test]
fn debug_and_errors_show_ids_in_hex_and_never_the_input() {
    let cx = WorkflowContext::parse(SENT, "a=1").unwrap();
    let printed = format!("{cx:?}");
    assert!(
        printed.contains(SENT) && printed.contains("a=1"),
        "{printed}"
    );

    let secret = "00-secret\u{1b}[31m-secret".repeat(1000);
    let error = WorkflowContext::parse(&secret, "").unwrap_err();
    let printed = format!("{error} {error:?}");
    assert!(
        !printed.contains("secret") && printed.len() < 200,
        "{printed}"
    );
}

// tracestate: the rules

#[test]
fn a_valid_tracestate_is_kept() {
    let longest = format!("{}={}", "k".repeat(256), "v".repeat(256));
    let most = numbered(32);
    // `,` and `=` aside, every printable character; the space not at the end.
    let value: String = (' '..='~').filter(|c| !",=".contains(*c)).collect();
    let every_character = format!("a1_-*/@z9_-*/={value}");
    let full: Vec<_> = (0..32).map(|i| format!("{i:0>256}={i:0>256}")).collect();
    let full = full.join(",");
    for (value, kept) in [
        ("", ""),
        (",", ""),
        (" , \t,,", ""),
        ("a=1", "a=1"),
        ("a=1,b=2", "a=1,b=2"),
        ("a=1,,b=2,", "a=1,b=2"),
        (" a=1 \t, \tb=2\t", "a=1,b=2"),
        // Leading spaces belong to the value, trailing ones do not.
        ("a=  1  ", "a=  1"),
        ("0=!", "0=!"),
        ("tenant@system=1", "tenant@system=1"),
        ("a@=1", "a@=1"),
        // Against the rules for its sender, but only vendors of the key know which value they mean.
        ("a=1,a=2", "a=1,a=2"),
        ("a=1, b=2, a=1", "a=1,b=2,a=1"),
        (&longest, &longest),
        (&most, &most),
        (&every_character, &every_character),
        (&full, &full),
        (&full.replace(',', " \t, \t"), &full),
    ] {
        let cx = WorkflowContext::parse(SENT, value).unwrap();
        assert_eq!(cx.tracestate(), kept, "{value:?}");
    }
}

#[test]
fn a_bad_tracestate_is_dropped_as_a_whole_and_never_costs_the_trace() {
    let too_many = numbered(33);
    let too_long = format!("a=1{}", " ".repeat(32 * 1024));
    #[rustfmt::skip]
    let bad = [
        // No pair, no key, no value.
        "a", "=", "=1", "a=", "a= ", "a=\t",
        // Keys.
        "A=1", "aB=1", "_a=1", "-a=1", "@a=1", "a b=1", "a =1", "a.b=1", "a\t=1", "ä=1", "a\0=1",
        &format!("{}=1", "k".repeat(257)),
        // Values.
        "a=1=2", "a==1", "a=1\t2", "a=ü", "a=\u{7f}", "a=\0", "a=1\n", "a=\u{a0}1",
        &format!("a={}", "v".repeat(257)),
        // Lists.
        "a=1;b=2", &too_many, &too_long,
    ];
    for bad in bad {
        for value in [bad.to_owned(), format!("x=1,{bad}"), format!("{bad},x=1")] {
            let cx = WorkflowContext::parse(SENT, &value).unwrap();
            assert_eq!(cx.tracestate(), "", "{value:?}");
            assert_eq!(cx.traceparent(), SENT);
        }
    }
}

/// Tracestates with members that OpenTelemetry's `TraceState` refuses, and what that type holds of them.
const WHOLE_STATES: [(&str, &str); 5] = [
    ("a@@b=1", ""),
    ("x=1,a@b@c=  2,y=3", "x=1,y=3"),
    ("a@12345678901234=1,x=1,x=2", "x=1,x=2"),
    ("t@-x=1", ""),
    ("y=~,t@-x=1,t@_x=2,t@*=3,t@/=4", "y=~"),
];

#[test]
fn a_tracestate_that_opentelemetry_refuses_is_passed_on() {
    for (state, otel) in WHOLE_STATES {
        let cx = WorkflowContext::parse(SENT, state).unwrap();
        assert_eq!(cx.tracestate(), state);
        let mut headers = HashMap::new();
        cx.inject(&mut headers);
        assert_eq!(headers["tracestate"], state);
        let span = cx.to_otel().span().span_context().clone();
        assert_eq!(span.trace_state().header(), otel);
        // The whole list counts in a comparison.
        assert_ne!(cx, WorkflowContext::try_from(&span).unwrap());

        let storage = WorkflowContextStorage::new();
        storage.store("order-42", cx.clone()).unwrap();
        assert_eq!(storage.get("order-42").unwrap(), Some(cx));
    }
}

#[test]
fn spans_pass_on_a_tracestate_that_opentelemetry_refuses() {
    for (state, otel) in WHOLE_STATES {
        let received = WorkflowContext::parse(SENT, state).unwrap();
        let worker = Worker::new();
        let (inside, later, own) = worker.run(|| {
            let _attached = received.to_otel().attach();
            let current = || WorkflowContext::current().unwrap();
            let request = info_span!("request");
            let inside = request.in_scope(current);
            let peeked = request.in_scope(|| WorkflowContext::peek().unwrap());
            assert_eq!(peeked.tracestate(), inside.tracestate());
            info_span!("first", workflow.instance_id = "order-42").in_scope(|| ());
            let elsewhere = Context::new().attach();
            let own = info_span!("own").in_scope(current);
            drop(elsewhere);
            let stored = worker.storage.get("order-42").unwrap().unwrap();
            let _attached = stored.to_otel().attach();
            let later = info_span!("later", workflow.instance_id = "order-42").in_scope(current);
            (inside, later, own)
        });
        assert_eq!(inside.tracestate(), state);
        assert_eq!(inside.trace_id(), received.trace_id());
        assert_ne!(inside.span_id(), received.span_id());
        assert_eq!(later.tracestate(), state);
        assert_eq!(own.tracestate(), "", "another trace");
        let stored = worker.storage.get("order-42").unwrap().unwrap();
        assert_eq!(stored.tracestate(), state);
        assert_eq!(
            worker.span("later").span_context.trace_state().header(),
            otel
        );
    }
}

#[test]
fn a_tracestate_that_a_sampler_changed_is_the_samplers() {
    let received = WorkflowContext::parse(SENT, "x=1,a@@b=2").unwrap();
    let cx = received.to_otel();
    let changed = TraceState::from_key_value([("ot", "th:8"), ("x", "1")]).unwrap();
    let span = span_context(
        &received.trace_id().to_string(),
        "00000000000000ab",
        1,
        changed.clone(),
    );
    let _attached = cx.with_remote_span_context(span).attach();
    let current = WorkflowContext::current().unwrap();
    assert_eq!(current.tracestate(), changed.header());
}

#[test]
fn empty_members_are_ignored() {
    let spread = numbered(32).replace(',', ", ,,");
    let cx = WorkflowContext::parse(SENT, &spread).unwrap();
    assert_eq!(cx.tracestate(), numbered(32));
}

// The suite of the W3C

/// The reaction that the suite expects to the headers.
enum Expected {
    /// The service continues the trace with this tracestate.
    Continued(&'static str),
    /// The service starts a new trace.
    Restarted,
}

/// The name of the suite's test, the headers it sends, and what it expects.
type Vector<'a> = (&'a str, &'a [(&'a str, &'a str)], Expected);

#[test]
fn the_w3c_test_vectors_pass() {
    use Expected::{Continued, Restarted};
    const T: &str = "traceparent";
    const S: &str = "tracestate";
    const P: &str = "00-12345678901234567890123456789012-1234567890123456-00";
    let key_256 = format!("{}=1", "z".repeat(256));
    let key_257 = format!("{}=1", "z".repeat(257));
    let tenant = format!("{}@v=1", "t".repeat(242));
    let tens = [
        numbered_from(1, 10),
        numbered_from(11, 10),
        numbered_from(21, 10),
    ];

    #[rustfmt::skip]
    let vectors: &[Vector<'_>] = &[
        ("both_traceparent_and_tracestate_missing", &[], Restarted),
        ("traceparent_included_tracestate_missing", &[(T, P)], Continued("")),
        ("traceparent_duplicated", &[(T, "00-12345678901234567890123456789011-1234567890123456-01"), (T, "00-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_duplicated, alike", &[(T, P), (T, P)], Restarted),
        ("traceparent_header_name", &[("trace-parent", P)], Restarted),
        ("traceparent_header_name", &[("trace.parent", P)], Restarted),
        ("traceparent_header_name_valid_casing", &[("TraceParent", P)], Continued("")),
        ("traceparent_header_name_valid_casing", &[("TrAcEpArEnT", P)], Continued("")),
        ("traceparent_header_name_valid_casing", &[("TRACEPARENT", P)], Continued("")),
        ("traceparent_version_0x00", &[(T, "00-12345678901234567890123456789012-1234567890123456-01.")], Restarted),
        ("traceparent_version_0x00", &[(T, "00-12345678901234567890123456789012-1234567890123456-01-what-the-future-will-be-like")], Restarted),
        ("traceparent_version_0xcc", &[(T, "cc-12345678901234567890123456789012-1234567890123456-01")], Continued("")),
        ("traceparent_version_0xcc", &[(T, "cc-12345678901234567890123456789012-1234567890123456-01-what-the-future-will-be-like")], Continued("")),
        ("traceparent_version_0xcc", &[(T, "cc-12345678901234567890123456789012-1234567890123456-01.what-the-future-will-be-like")], Restarted),
        ("traceparent_version_0xff", &[(T, "ff-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_version_illegal_characters", &[(T, ".0-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_version_illegal_characters", &[(T, "0.-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_version_too_long", &[(T, "000-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_version_too_long", &[(T, "0000-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_version_too_short", &[(T, "0-12345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_trace_id_all_zero", &[(T, "00-00000000000000000000000000000000-1234567890123456-01")], Restarted),
        ("traceparent_trace_id_illegal_characters", &[(T, "00-.2345678901234567890123456789012-1234567890123456-01")], Restarted),
        ("traceparent_trace_id_illegal_characters", &[(T, "00-1234567890123456789012345678901.-1234567890123456-01")], Restarted),
        ("traceparent_trace_id_too_long", &[(T, "00-123456789012345678901234567890123-1234567890123456-01")], Restarted),
        ("traceparent_trace_id_too_short", &[(T, "00-1234567890123456789012345678901-1234567890123456-01")], Restarted),
        ("traceparent_parent_id_all_zero", &[(T, "00-12345678901234567890123456789012-0000000000000000-01")], Restarted),
        ("traceparent_parent_id_illegal_characters", &[(T, "00-12345678901234567890123456789012-.234567890123456-01")], Restarted),
        ("traceparent_parent_id_illegal_characters", &[(T, "00-12345678901234567890123456789012-123456789012345.-01")], Restarted),
        ("traceparent_parent_id_too_long", &[(T, "00-12345678901234567890123456789012-12345678901234567-01")], Restarted),
        ("traceparent_parent_id_too_short", &[(T, "00-12345678901234567890123456789012-123456789012345-01")], Restarted),
        ("traceparent_trace_flags_illegal_characters", &[(T, "00-12345678901234567890123456789012-1234567890123456-.0")], Restarted),
        ("traceparent_trace_flags_illegal_characters", &[(T, "00-12345678901234567890123456789012-1234567890123456-0.")], Restarted),
        ("traceparent_trace_flags_too_long", &[(T, "00-12345678901234567890123456789012-1234567890123456-001")], Restarted),
        ("traceparent_trace_flags_too_short", &[(T, "00-12345678901234567890123456789012-1234567890123456-1")], Restarted),
        ("traceparent_ows_handling", &[(T, " 00-12345678901234567890123456789012-1234567890123456-01")], Continued("")),
        ("traceparent_ows_handling", &[(T, "\t00-12345678901234567890123456789012-1234567890123456-01")], Continued("")),
        ("traceparent_ows_handling", &[(T, "00-12345678901234567890123456789012-1234567890123456-01 ")], Continued("")),
        ("traceparent_ows_handling", &[(T, "00-12345678901234567890123456789012-1234567890123456-01\t")], Continued("")),
        ("traceparent_ows_handling", &[(T, "\t 00-12345678901234567890123456789012-1234567890123456-01 \t")], Continued("")),
        ("tracestate_included_traceparent_missing", &[(S, "foo=1")], Restarted),
        ("tracestate_included_traceparent_included", &[(T, P), (S, "foo=1,bar=2")], Continued("foo=1,bar=2")),
        ("tracestate_header_name", &[(T, P), ("trace-state", "foo=1")], Continued("")),
        ("tracestate_header_name_valid_casing", &[(T, P), ("TrAcEsTaTe", "foo=1")], Continued("foo=1")),
        ("tracestate_empty_header", &[(T, P), (S, "")], Continued("")),
        ("tracestate_empty_header", &[(T, P), (S, "foo=1"), (S, "")], Continued("foo=1")),
        ("tracestate_empty_header", &[(T, P), (S, ""), (S, "foo=1")], Continued("foo=1")),
        ("tracestate_multiple_headers_different_keys", &[(T, P), (S, "foo=1,bar=2"), (S, "rojo=1,congo=2"), (S, "baz=3")], Continued("foo=1,bar=2,rojo=1,congo=2,baz=3")),
        ("tracestate_ows_handling", &[(T, P), (S, "foo=1 \t , \t bar=2, \t baz=3")], Continued("foo=1,bar=2,baz=3")),
        ("tracestate_ows_handling", &[(T, P), (S, "foo=1\t \t,\t \tbar=2,\t \tbaz=3")], Continued("foo=1,bar=2,baz=3")),
        ("tracestate_ows_handling", &[(T, P), (S, " foo=1")], Continued("foo=1")),
        ("tracestate_ows_handling", &[(T, P), (S, "\tfoo=1")], Continued("foo=1")),
        ("tracestate_ows_handling", &[(T, P), (S, "foo=1 ")], Continued("foo=1")),
        ("tracestate_ows_handling", &[(T, P), (S, "foo=1\t")], Continued("foo=1")),
        ("tracestate_ows_handling", &[(T, P), (S, "\t foo=1 \t")], Continued("foo=1")),
        ("tracestate_key_illegal_characters", &[(T, P), (S, "foo =1")], Continued("")),
        ("tracestate_key_illegal_characters", &[(T, P), (S, "FOO=1")], Continued("")),
        ("tracestate_key_illegal_characters", &[(T, P), (S, "foo.bar=1")], Continued("")),
        ("tracestate_key_illegal_vendor_format", &[(T, P), (S, "foo@=1,bar=2")], Continued("foo@=1,bar=2")),
        ("tracestate_key_illegal_vendor_format", &[(T, P), (S, "@foo=1,bar=2")], Continued("")),
        ("tracestate_member_count_limit", &[(T, P), (S, &tens[0]), (S, &tens[1]), (S, &tens[2]), (S, "bar31=31,bar32=32,bar33=33")], Continued("")),
        ("tracestate_key_length_limit", &[(T, P), (S, "foo=1"), (S, &key_257)], Continued("")),
        ("tracestate_value_illegal_characters", &[(T, P), (S, "foo=bar=baz")], Continued("")),
        ("tracestate_value_illegal_characters", &[(T, P), (S, "foo=,bar=3")], Continued("")),
        ("propagates_random_flag", &[(T, "00-12345678901234567890123456789012-1234567890123456-02")], Continued("")),
        // Each value is kept, so one of them is.
        ("tracestate_duplicated_keys", &[(T, P), (S, "foo=1,foo=1")], Continued("foo=1,foo=1")),
        ("tracestate_duplicated_keys", &[(T, P), (S, "foo=1,foo=2")], Continued("foo=1,foo=2")),
        ("tracestate_duplicated_keys", &[(T, P), (S, "foo=1"), (S, "foo=1")], Continued("foo=1,foo=1")),
        ("tracestate_duplicated_keys", &[(T, P), (S, "foo=1"), (S, "foo=2")], Continued("foo=1,foo=2")),
        ("tracestate_key_illegal_vendor_format", &[(T, P), (S, "foo@@bar=1,bar=2")], Continued("foo@@bar=1,bar=2")),
        ("tracestate_key_illegal_vendor_format", &[(T, P), (S, "foo@bar@baz=1,bar=2")], Continued("foo@bar@baz=1,bar=2")),
        ("tracestate_key_length_limit", &[(T, P), (S, "foo=1"), (S, "t@vvvvvvvvvvvvvvv=1")], Continued("foo=1,t@vvvvvvvvvvvvvvv=1")),
    ];
    for (name, headers, expected) in vectors {
        let extracted = WorkflowContext::extract(&Headers::new(headers));
        match (extracted, expected) {
            (Ok(cx), Continued(tracestate)) => {
                assert_eq!(
                    cx.trace_id().to_string(),
                    "12345678901234567890123456789012",
                    "{name}"
                );
                assert_eq!(cx.tracestate(), *tracestate, "{name}");
            }
            (Err(_), Restarted) => {}
            (got, _) => panic!("{name} {headers:?}: {got:?}"),
        }
    }

    // Vectors that do not fit into a constant.
    let joined = |values: &[&str]| {
        let mut headers = Headers::new(&[(T, P)]);
        headers.0.extend(
            values
                .iter()
                .map(|value| (S.to_owned(), (*value).to_owned())),
        );
        WorkflowContext::extract(&headers).unwrap().tracestate()
    };
    assert_eq!(joined(&["foo=1", &key_256]), format!("foo=1,{key_256}"));
    assert_eq!(joined(&["foo=1", &tenant]), format!("foo=1,{tenant}"));
    let [first, second, third] = &tens;
    assert_eq!(
        joined(&[first, second, third, "bar31=31,bar32=32"]),
        format!("{first},{second},{third},bar31=31,bar32=32"),
    );
    let random = WorkflowContext::parse(
        "00-12345678901234567890123456789012-1234567890123456-02",
        "",
    );
    assert!(random.unwrap().traceparent().ends_with("-02"));
}

// Carriers

#[test]
fn a_context_round_trips_through_a_map() {
    for state in ["", "a=1,b=2"] {
        let cx = WorkflowContext::parse(SENT, state).unwrap();
        let mut headers = HashMap::<String, String>::new();
        cx.inject(&mut headers);
        assert_eq!(headers.get("traceparent").map(String::as_str), Some(SENT));
        assert_eq!(
            headers.get("tracestate").map(String::as_str),
            Some(state).filter(|s| !s.is_empty())
        );
        assert!(same(&WorkflowContext::extract(&headers).unwrap(), &cx));
    }
}

#[test]
fn an_empty_carrier_and_two_traceparents_are_errors() {
    let extract = |headers: &[(&str, &str)]| WorkflowContext::extract(&Headers::new(headers));
    assert_eq!(extract(&[]), Err(ParseContextError::Missing));
    assert_eq!(
        extract(&[("tracestate", "a=1")]),
        Err(ParseContextError::Missing)
    );
    let (once, again) = (("traceparent", SENT), ("Traceparent", SENT));
    assert_eq!(extract(&[once, again]), Err(ParseContextError::Duplicate));
    assert_eq!(
        extract(&[once, ("traceparent", "junk")]),
        Err(ParseContextError::Duplicate)
    );
    assert_eq!(
        extract(&[("traceparent", "")]),
        Err(ParseContextError::Length)
    );
}

#[test]
fn several_tracestates_are_joined() {
    let extract = |states: &[&str]| {
        let mut headers = Headers::new(&[("traceparent", SENT)]);
        headers.0.extend(
            states
                .iter()
                .map(|state| ("tracestate".to_owned(), (*state).to_owned())),
        );
        WorkflowContext::extract(&headers).unwrap().tracestate()
    };
    assert_eq!(extract(&["b=1", "a=2,c=3", "", " d=4 "]), "b=1,a=2,c=3,d=4");
    // The limits are those of the list.
    assert_eq!(extract(&[&numbered(32)]), numbered(32));
    assert_eq!(extract(&[&numbered(32), "x=1"]), "");
    assert_eq!(extract(&["a=1", "a=2"]), "a=1,a=2");
    assert_eq!(extract(&["a=1", "nonsense"]), "");
}

// Span contexts

#[test]
fn a_span_context_converts_and_an_invalid_one_is_an_error() {
    let state = TraceState::from_key_value([("a", "1"), ("b", "2")]).unwrap();
    let span = span_context(TRACE, SPAN, 0x01, state);
    let cx = WorkflowContext::try_from(&span).unwrap();
    assert_eq!(
        (cx.traceparent().as_str(), cx.tracestate().as_str()),
        (SENT, "a=1,b=2")
    );
    assert!(!cx.is_resumed());

    let zero = "0";
    for (trace, span, why) in [
        (zero, zero, ParseContextError::ZeroTraceId),
        (zero, SPAN, ParseContextError::ZeroTraceId),
        (TRACE, zero, ParseContextError::ZeroSpanId),
    ] {
        let invalid = span_context(trace, span, 0x01, TraceState::NONE);
        assert_eq!(WorkflowContext::try_from(&invalid), Err(why));
    }
}

#[test]
fn flags_and_tracestate_of_a_span_context_are_validated_too() {
    for (flags, written) in [
        (0x00, "00"),
        (0x01, "01"),
        (0x02, "02"),
        (0xfd, "01"),
        (0xff, "03"),
    ] {
        let cx =
            WorkflowContext::try_from(&span_context(TRACE, SPAN, flags, TraceState::NONE)).unwrap();
        assert!(
            cx.traceparent().ends_with(written),
            "{flags:#x}: {}",
            cx.traceparent()
        );
    }
    // Members that OpenTelemetry accepts and the specification forbids.
    for member in [
        ("a", ""),
        ("", "1"),
        ("a", "ü"),
        ("a", "1 "),
        ("a", "x\r\nset-cookie: y"),
    ] {
        let state = TraceState::from_key_value([("b", "2"), member]).unwrap();
        let cx = WorkflowContext::try_from(&span_context(TRACE, SPAN, 0x01, state)).unwrap();
        assert_eq!(
            (cx.traceparent().as_str(), cx.tracestate().as_str()),
            (SENT, ""),
            "{member:?}"
        );
    }
}

#[test]
fn to_otel_returns_only_a_remote_parent() {
    let cx = WorkflowContext::parse(
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03",
        "a=1",
    )
    .unwrap();
    let surrounding = Context::new().with_value(17_u8);
    let _attached = surrounding.attach();
    let otel = cx.to_otel();
    assert_eq!(otel.get::<u8>(), None);

    let span = otel.span().span_context().clone();
    assert!(span.is_remote() && span.is_valid() && span.is_sampled());
    assert_eq!(span.trace_flags(), TraceFlags::new(0x03));
    assert_eq!(span.trace_state().header(), "a=1");
    assert!(same(&WorkflowContext::try_from(&span).unwrap(), &cx));
}

#[test]
fn to_otel_can_be_used_as_a_parent() {
    let cx = WorkflowContext::parse(SENT, "a=1").unwrap();
    in_spans_of(Sampler::ParentBased(Box::new(Sampler::AlwaysOff)), || {
        let span = tracing::info_span!("child");
        span.set_parent(cx.to_otel()).unwrap();
        let child = span.context().span().span_context().clone();
        assert_eq!(child.trace_id(), cx.trace_id());
        assert_ne!(child.span_id(), cx.span_id());
        assert!(child.is_sampled());
        assert_eq!(child.trace_state().header(), "a=1");
    });
}

// The current span

#[test]
fn without_a_span_there_is_no_current_context() {
    assert_eq!(WorkflowContext::current(), None);
    let _span = tracing::info_span!("nobody listens").entered();
    assert_eq!(WorkflowContext::current(), None);
}

#[test]
fn an_attached_context_is_current() {
    let cx = WorkflowContext::parse(SENT, "a=1").unwrap();
    let attached = cx.to_otel().attach();
    assert!(same(&WorkflowContext::current().unwrap(), &cx));
    drop(attached);
    assert_eq!(WorkflowContext::current(), None);

    // An invalid span is none.
    let _attached = Context::new()
        .with_remote_span_context(SpanContext::NONE)
        .attach();
    assert_eq!(WorkflowContext::current(), None);
}

#[test]
fn a_span_made_through_the_opentelemetry_api_is_current() {
    let span = tracer(Sampler::AlwaysOn).start("by hand");
    let _attached = Context::current_with_span(span).attach();
    let own = Context::current().span().span_context().clone();
    assert!(same(
        &WorkflowContext::current().unwrap(),
        &WorkflowContext::try_from(&own).unwrap()
    ));
}

#[test]
fn a_tracing_span_is_current_whether_sampled_or_not() {
    for (sampler, sampled) in [(Sampler::AlwaysOn, true), (Sampler::AlwaysOff, false)] {
        in_spans_of(sampler, || {
            assert_eq!(WorkflowContext::current(), None);
            let outer = tracing::info_span!("outer").entered();
            let of_outer = WorkflowContext::current().unwrap();
            assert_eq!(of_outer.is_sampled(), sampled);
            let span = outer.context().span().span_context().clone();
            assert!(same(&of_outer, &WorkflowContext::try_from(&span).unwrap()));

            let of_inner = tracing::info_span!("inner")
                .in_scope(WorkflowContext::current)
                .unwrap();
            assert_eq!(of_inner.trace_id(), of_outer.trace_id());
            assert_ne!(of_inner.span_id(), of_outer.span_id());
        });
    }
}

#[test]
fn a_tracing_span_takes_precedence_over_an_attached_context() {
    in_spans_of(Sampler::AlwaysOn, || {
        let outer = tracing::info_span!("outer").entered();
        let _attached = WorkflowContext::parse(SENT, "").unwrap().to_otel().attach();
        let current = WorkflowContext::current().unwrap();
        assert_eq!(
            current.span_id(),
            outer.context().span().span_context().span_id()
        );
    });
}

#[test]
fn a_span_hidden_from_the_opentelemetry_layer_is_skipped() {
    let cx = WorkflowContext::parse(SENT, "").unwrap();
    // Another layer enables the span, and a filter hides it from the OpenTelemetry layer.
    let layer = tracing_opentelemetry::layer().with_tracer(tracer(Sampler::AlwaysOn));
    let subscriber = tracing_subscriber::registry()
        .with(layer.with_filter(LevelFilter::INFO))
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::sink));
    tracing::subscriber::with_default(subscriber, || {
        let _hidden = tracing::debug_span!("hidden").entered();
        assert_eq!(WorkflowContext::current(), None);
        let _attached = cx.to_otel().attach();
        assert!(same(&WorkflowContext::current().unwrap(), &cx));
    });
    // No OpenTelemetry layer at all.
    tracing::subscriber::with_default(tracing_subscriber::registry(), || {
        let _span = tracing::info_span!("not OpenTelemetry's").entered();
        assert_eq!(WorkflowContext::current(), None);
        let _attached = cx.to_otel().attach();
        assert!(same(&WorkflowContext::current().unwrap(), &cx));
    });
}

// Beside the SDK's propagator

/// Traceparents that the SDK reads and the specification forbids.
const SDK_READS: [&str; 13] = [
    // Fields that are too short or too long.
    "0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "000-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-4bf9-00f067aa0ba902b7-01",
    "00-04bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
    // A plus sign.
    "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-+0f067aa0ba902b7-01",
    "+0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    // A dash behind version 00.
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
    // A version in upper case.
    "CC-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    // Characters that are not blanks in HTTP.
    "\n00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\u{3000}",
];

/// Tracestates that the specification forbids, and what the SDK makes of them.
const SDK_KEEPS: [(&str, &str); 5] = [
    ("a=", "a="),
    ("=1", "=1"),
    ("a==1", "a=1"),
    ("a=ü", "a=ü"),
    ("a=1\t2", "a=1\t2"),
];

#[test]
fn the_specification_is_followed_where_the_sdk_is_laxer() {
    for value in SDK_READS {
        assert!(
            sdk_extract(value, "").is_some(),
            "no difference any more: {value:?}"
        );
        assert!(WorkflowContext::parse(value, "").is_err(), "{value:?}");
    }
    for (state, kept) in SDK_KEEPS {
        let span = sdk_extract(SENT, state).unwrap();
        assert_eq!(span.trace_state().header(), kept, "no difference any more");
        assert_eq!(
            WorkflowContext::parse(SENT, state).unwrap().tracestate(),
            "",
            "{state:?}"
        );
    }
    // Of too many members the SDK keeps the first 32.
    let span = sdk_extract(SENT, &numbered(33)).unwrap();
    assert_eq!(
        span.trace_state().header(),
        numbered(32),
        "no difference any more"
    );
}

#[test]
fn nothing_is_lost_where_the_sdk_loses_something() {
    // The random flag of level 2.
    let random = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03";
    assert_eq!(
        sdk_extract(random, "").unwrap().trace_flags(),
        TraceFlags::SAMPLED
    );
    assert_eq!(
        WorkflowContext::parse(random, "").unwrap().traceparent(),
        random
    );
    // All headers but the first.
    let headers = Headers::new(&[
        ("traceparent", SENT),
        ("tracestate", "a=1"),
        ("tracestate", "b=2"),
    ]);
    let sdk = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    assert_eq!(sdk.span().span_context().trace_state().header(), "a=1");
    assert_eq!(
        WorkflowContext::extract(&headers).unwrap().tracestate(),
        "a=1,b=2"
    );
}

proptest! {
    #[test]
    fn any_context_comes_back_from_its_headers(span in any_span_context()) {
        let cx = WorkflowContext::try_from(&span).unwrap();
        let (parent, state) = (cx.traceparent(), cx.tracestate());
        prop_assert_eq!(&state, &span.trace_state().header());
        prop_assert!(same(&WorkflowContext::parse(&parent, &state).unwrap(), &cx));

        let mut headers = HashMap::<String, String>::new();
        cx.inject(&mut headers);
        prop_assert!(same(&WorkflowContext::extract(&headers).unwrap(), &cx));
    }

    #[test]
    fn what_one_writes_the_other_reads(span in any_span_context()) {
        let cx = WorkflowContext::try_from(&span).unwrap();
        // The SDK has no random flag.
        let known = TraceFlags::new(span.trace_flags().to_u8() & 0x01);

        let read = sdk_extract(&cx.traceparent(), &cx.tracestate()).unwrap();
        prop_assert_eq!(read.trace_id(), span.trace_id());
        prop_assert_eq!(read.span_id(), span.span_id());
        prop_assert_eq!(read.trace_flags(), known);
        prop_assert_eq!(read.trace_state(), span.trace_state());

        let mut headers = HashMap::<String, String>::new();
        let otel = Context::new().with_remote_span_context(span.clone());
        TraceContextPropagator::new().inject_context(&otel, &mut headers);
        let read = WorkflowContext::extract(&headers).unwrap();
        prop_assert_eq!(read.trace_id(), span.trace_id());
        prop_assert_eq!(read.span_id(), span.span_id());
        prop_assert_eq!(read.is_sampled(), known.is_sampled());
        prop_assert_eq!(read.tracestate(), cx.tracestate());
    }

    /// Whatever is read, the specification allows and the SDK reads alike; whatever is not, the specification forbids.
    #[test]
    fn a_traceparent_is_read_exactly_when_it_goes_by_the_book(value in nearly_a_traceparent()) {
        let read = WorkflowContext::parse(&value, "");
        prop_assert_eq!(read.is_ok(), is_valid_by_specification(&value), "{:?}", read);
        if let Ok(cx) = read {
            let sdk = sdk_extract(&value, "").expect("the SDK is never the stricter one");
            prop_assert_eq!(cx.trace_id(), sdk.trace_id());
            prop_assert_eq!(cx.span_id(), sdk.span_id());
            prop_assert_eq!(cx.is_sampled(), sdk.is_sampled());
        }
    }

    #[test]
    fn what_is_kept_of_a_tracestate_the_sdk_keeps_too(state in nearly_a_tracestate()) {
        let kept = WorkflowContext::parse(SENT, &state).unwrap().tracestate();
        if !kept.is_empty() {
            let sdk = sdk_extract(SENT, &state).unwrap().trace_state().header();
            // The SDK drops a list with a key that its type refuses.
            prop_assert!(sdk == kept || sdk.is_empty(), "{:?} and {:?}", sdk, kept);
        }
    }

    #[test]
    fn no_text_is_too_odd(parent in any::<String>(), state in any::<String>()) {
        prop_assert_eq!(WorkflowContext::parse(&parent, &state).is_ok(), is_valid_by_specification(&parent));
        let cx = WorkflowContext::parse(SENT, &state).unwrap();
        prop_assert!(cx.tracestate().is_ascii());
    }
}

// Hostile input

#[test]
fn multibyte_characters_are_refused_at_any_position() {
    for at in 0..SENT.len() {
        for wide in ["é", "\u{3000}", "𝟘", "\0", "\u{7f}", "\u{80}"] {
            // Once as long in characters, once in bytes.
            for length in [1, wide.len().min(SENT.len() - at)] {
                let value = format!("{}{wide}{}", &SENT[..at], &SENT[at + length..]);
                assert!(WorkflowContext::parse(&value, "").is_err(), "{value:?}");
            }
        }
    }
    for end in 0..SENT.len() {
        assert_eq!(
            WorkflowContext::parse(&SENT[..end], ""),
            Err(ParseContextError::Length)
        );
    }
}

#[test]
fn huge_headers_are_handled_in_bounded_time() {
    const HUGE: usize = 100_000_000;
    let started = Instant::now();
    for unit in ["0", "é", ",", "a=1,", SENT] {
        let huge = unit.repeat(HUGE / unit.len());
        assert!(WorkflowContext::parse(&huge, &huge).is_err(), "{unit:?}");
        let cx = WorkflowContext::parse(SENT, &huge).unwrap();
        assert_eq!(cx.tracestate(), "", "{unit:?}");
    }
    // Data of a later version after the flags is unbounded, and not read.
    let future = format!("01{}-{}", &SENT[2..], "x".repeat(HUGE));
    assert_eq!(
        WorkflowContext::parse(&future, "").unwrap().traceparent(),
        SENT
    );
    // Blanks are skipped one by one.
    let blank = " ".repeat(HUGE / 10);
    assert_eq!(
        WorkflowContext::parse(&blank, ""),
        Err(ParseContextError::Length)
    );
    assert!(WorkflowContext::parse(&format!("{blank}{SENT}{blank}"), "").is_ok());

    let many = Many {
        traceparents: 1,
        tracestates: 1_000_000,
    };
    assert_eq!(WorkflowContext::extract(&many).unwrap().tracestate(), "");
    let many = Many {
        traceparents: 1_000_000,
        tracestates: 0,
    };
    assert_eq!(
        WorkflowContext::extract(&many),
        Err(ParseContextError::Duplicate)
    );
    // Most of the time is spent building the input.
    assert!(
        started.elapsed() < Duration::from_secs(60),
        "{:?}",
        started.elapsed()
    );
}

// Helpers

/// Returns whether a traceparent is valid, written as the specification words the rules.
fn is_valid_by_specification(value: &str) -> bool {
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let fields: Vec<_> = value.trim_matches([' ', '\t']).splitn(5, '-').collect();
    let [version, trace_id, parent_id, flags, ref rest @ ..] = fields[..] else {
        return false;
    };
    hex(version, 2)
        && version != "ff"
        && (rest.is_empty() || version != "00")
        && hex(trace_id, 32)
        && trace_id.bytes().any(|b| b != b'0')
        && hex(parent_id, 16)
        && parent_id.bytes().any(|b| b != b'0')
        && hex(flags, 2)
}

/// Returns whether the contexts are equal but for the time of recording.
fn same(a: &WorkflowContext, b: &WorkflowContext) -> bool {
    let parts = |cx: &WorkflowContext| (cx.traceparent(), cx.tracestate(), cx.is_resumed());
    parts(a) == parts(b)
}

fn numbered(members: usize) -> String {
    numbered_from(1, members)
}

fn numbered_from(first: usize, members: usize) -> String {
    let members: Vec<_> = (first..first + members)
        .map(|i| format!("bar{i:02}={i:02}"))
        .collect();
    members.join(",")
}

fn span_context(trace: &str, span: &str, flags: u8, state: TraceState) -> SpanContext {
    SpanContext::new(
        TraceId::from_hex(trace).unwrap(),
        SpanId::from_hex(span).unwrap(),
        TraceFlags::new(flags),
        false,
        state,
    )
}

fn sdk_extract(traceparent: &str, tracestate: &str) -> Option<SpanContext> {
    let headers = Headers::new(&[("traceparent", traceparent), ("tracestate", tracestate)]);
    let cx = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    Some(cx.span().span_context().clone()).filter(SpanContext::is_valid)
}

fn tracer(sampler: Sampler) -> SdkTracer {
    SdkTracerProvider::builder()
        .with_sampler(sampler)
        .build()
        .tracer("test")
}

/// Runs where the spans of `tracing` become OpenTelemetry's by a plain layer, without a storage.
fn in_spans_of<T>(sampler: Sampler, run: impl FnOnce() -> T) -> T {
    let layer = tracing_opentelemetry::layer().with_tracer(tracer(sampler));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), run)
}

/// Headers as HTTP has them: names in any case, and more than once.
#[derive(Debug)]
struct Headers(Vec<(String, String)>);

impl Headers {
    fn new(headers: &[(&str, &str)]) -> Self {
        Self(
            headers
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
        )
    }
}

impl Extractor for Headers {
    fn get(&self, key: &str) -> Option<&str> {
        self.get_all(key)?.first().copied()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        let named = self
            .0
            .iter()
            .filter(|(name, _)| name.eq_ignore_ascii_case(key));
        let values: Vec<_> = named.map(|(_, value)| value.as_str()).collect();
        (!values.is_empty()).then_some(values)
    }
}

impl Injector for Headers {
    fn set(&mut self, key: &str, value: String) {
        self.0.push((key.to_owned(), value));
    }
}

/// A carrier that has the same headers over and over.
struct Many {
    traceparents: usize,
    tracestates: usize,
}

impl Extractor for Many {
    fn get(&self, _: &str) -> Option<&str> {
        None
    }

    fn keys(&self) -> Vec<&str> {
        Vec::new()
    }

    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        Some(match key {
            "traceparent" => vec![SENT; self.traceparents],
            _ => vec!["a=1"; self.tracestates],
        })
    }
}

fn any_span_context() -> impl Strategy<Value = SpanContext> {
    let ids = (1..=u128::MAX, 1..=u64::MAX, any::<u8>());
    let members = prop::collection::btree_map(any_key(), any_value(), 0..=32);
    (ids, members, any::<bool>()).prop_map(|((trace_id, span_id, flags), members, remote)| {
        let state = TraceState::from_key_value(members).expect("valid members");
        SpanContext::new(
            trace_id.into(),
            span_id.into(),
            TraceFlags::new(flags),
            remote,
            state,
        )
    })
}

/// A key that level 2 and OpenTelemetry both allow.
fn any_key() -> impl Strategy<Value = String> {
    "[a-z0-9][a-z0-9_*/-]{0,240}(@[a-z0-9][a-z0-9_*/-]{0,12})?"
}

fn any_value() -> impl Strategy<Value = String> {
    "[ -+\\--<>-~]{0,255}[!-+\\--<>-~]"
}

/// A traceparent with up to three faults: a character replaced, added or taken away.
fn nearly_a_traceparent() -> impl Strategy<Value = String> {
    let version = prop_oneof![Just("00".to_owned()), "[0-9a-f]{2}"];
    let ids = prop_oneof![4 => "[0-9a-f]{32}-[0-9a-f]{16}", 1 => "0{31}[01]-0{15}[01]"];
    let tail = prop_oneof![4 => "", 1 => "-[ -~]{0,9}", 1 => "[ \t]{1,3}"];
    let whole = (version, ids, "[0-9a-f]{2}", tail)
        .prop_map(|(version, ids, flags, tail)| format!("{version}-{ids}-{flags}{tail}"));
    let odd: Vec<char> = "0123456789abcdefgABCDEFG+-_. \t\né\u{3000}\0"
        .chars()
        .collect();
    let fault = (any::<Index>(), select(odd), 0..3);
    (whole, prop::collection::vec(fault, 0..=3)).prop_map(|(whole, faults)| {
        let mut chars: Vec<_> = whole.chars().collect();
        for (at, odd, kind) in faults {
            match kind {
                0 => *at.get_mut(&mut chars) = odd,
                1 => chars.insert(at.index(chars.len() + 1), odd),
                _ => drop(chars.remove(at.index(chars.len()))),
            }
        }
        chars.into_iter().collect()
    })
}

/// A list of members of which most are right. Shorter than 32, where the SDK goes other ways.
fn nearly_a_tracestate() -> impl Strategy<Value = String> {
    let good = (any_key(), any_value()).prop_map(|(key, value)| format!("{key}={value}"));
    let blank = "[ \t]{0,3}";
    let odd = "[a-zA-Z0-9@=_ é\t-]{0,20}";
    let member = prop_oneof![8 => good.boxed(), 2 => blank.boxed(), 1 => odd.boxed()];
    let member =
        (blank, member, blank).prop_map(|(before, member, after)| before + &member + &after);
    prop::collection::vec(member, 0..8).prop_map(|members| members.join(","))
}
