//! No field value makes the layer panic or store more than the limit.

use std::fmt;
use std::num::{NonZeroU64, Wrapping};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::support::*;
use opentelemetry::Context;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tracing::field::{Empty, Value};
use tracing::{Dispatch, info, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{
    InvalidInstanceId, MAX_INSTANCE_ID_BYTES, StorageError, WorkflowContextStorage,
};

/// The way in which an id reaches the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// With the span.
    Created,
    /// On a span that waits for it.
    Recorded,
    /// On a span that has started without it.
    RecordedLate,
    /// With the first child of an engine's span.
    BelowEngine,
}

const WAYS: [Way; 4] = [
    Way::Created,
    Way::Recorded,
    Way::RecordedLate,
    Way::BelowEngine,
];

impl Way {
    fn tag(self, id: &dyn Value) {
        match self {
            Self::Created => info_span!("tagged", workflow.instance_id = id).in_scope(inner),
            Self::Recorded => {
                let span = info_span!("tagged", workflow.instance_id = Empty).entered();
                span.record("workflow.instance_id", id);
                inner();
            }
            Self::RecordedLate => {
                let span = info_span!("tagged", workflow.instance_id = Empty).entered();
                inner();
                span.record("workflow.instance_id", id);
            }
            Self::BelowEngine => info_span!("engine").in_scope(|| Self::Created.tag(id)),
        }
    }

    fn span_count(self) -> usize {
        2 + usize::from(self == Self::BelowEngine)
    }
}

fn inner() {
    info_span!("inner").in_scope(|| info!("inside"));
}

fn adopting_engines() -> WorkflowContextStorage {
    let storage = WorkflowContextStorage::builder().adopt_spans(["engine"]);
    storage.build().unwrap()
}

/// Runs a check for each way and activation mode, on a new worker.
fn in_every_way(check: impl Fn(&Worker, Way)) {
    for way in WAYS {
        for worker in both_activations(adopting_engines) {
            let _drawing = DrawnOnPanic(&worker, format!("{way:?}"));
            check(&worker, way);
            assert_bounded(&worker.storage);
        }
    }
}

/// Asserts that the id names this instance, or none, and that every span is exported in either case.
fn assert_names(id: &dyn Value, expected: Option<&str>) {
    in_every_way(|worker, way| {
        worker.run(|| way.tag(id));
        let forest = worker.forest();
        forest.assert_one_trace().assert_no_orphans();
        assert_eq!(forest.span_count(), way.span_count());
        let expected: Vec<_> = expected.into_iter().collect();
        assert_eq!(worker.storage.instance_ids(), expected);
        for id in expected {
            assert_eq!(worker.stored_trace(id), forest.trace_ids()[0]);
        }
    });
}

fn assert_bounded(storage: &WorkflowContextStorage) {
    let ids = storage.instance_ids();
    let longest = ids.iter().map(String::len).max().unwrap_or_default();
    assert!(
        longest <= MAX_INSTANCE_ID_BYTES,
        "{longest} bytes are stored"
    );
}

/// Asserts that the layer still works, and that no state is left on the thread.
fn assert_works(worker: &Worker) {
    worker.run(|| Way::Created.tag(&"afterwards"));
    worker.run(|| Way::BelowEngine.tag(&"afterwards"));
    worker.run(|| Way::Recorded.tag(&"afterwards"));
    let trace = worker.stored_trace("afterwards");
    let spans = worker.spans();
    let in_trace = spans
        .iter()
        .filter(|span| span.span_context.trace_id() == trace);
    let count = Way::span_count;
    let expected = count(Way::Created) + count(Way::BelowEngine) + count(Way::Recorded);
    assert_eq!(in_trace.count(), expected);
}

#[test]
fn an_id_of_any_type_is_its_formatted_value() {
    let error = std::io::Error::other("failed");
    let error: &(dyn std::error::Error + 'static) = &error;
    let cases: [(&dyn Value, &str); 25] = [
        (&"text", "text"),
        (&String::from("string"), "string"),
        (&Box::new(String::from("boxed")), "boxed"),
        (&tracing::field::display("displayed"), "displayed"),
        (&tracing::field::debug("debugged"), "debugged"),
        (&tracing::field::debug(Some("nested")), "nested"),
        (&format_args!("{}-{}", "order", 42), "order-42"),
        (&0_i64, "0"),
        (&-42_i64, "-42"),
        (&i64::MIN, "-9223372036854775808"),
        (&7_u8, "7"),
        (&u64::MAX, "18446744073709551615"),
        (&i128::MIN, "-170141183460469231731687303715884105728"),
        (&u128::MAX, "340282366920938463463374607431768211455"),
        (&Wrapping(3_i64), "3"),
        (&NonZeroU64::MIN, "1"),
        (&1.5_f64, "1.5"),
        (&f64::NAN, "NaN"),
        (&f64::NEG_INFINITY, "-inf"),
        (&true, "true"),
        (&false, "false"),
        (&error, "failed"),
        (&Some("some"), "some"),
        (&Some(&Some(5_i64)), "5"),
        (&&b"\x0a\xff"[..], "[0a ff]"),
    ];
    for (id, expected) in cases {
        assert_names(id, Some(expected));
    }
}

/// Without a fraction, `Debug` prints `1.0` and `Display` prints `1`.
#[test]
fn a_whole_float_names_one_instance_however_it_is_given() {
    for (id, expected) in [
        (1.0_f64, "1"),
        (-0.0, "-0"),
        (1e21, "1000000000000000000000"),
    ] {
        assert_names(&id, Some(expected));
    }
}

#[test]
fn a_field_without_a_value_names_no_instance() {
    let values: [&dyn Value; 12] = [
        &Empty,
        &None::<&str>,
        &None::<u64>,
        &tracing::field::debug(None::<&str>),
        &tracing::field::debug(Some("")),
        &tracing::field::debug(Some(None::<u64>)),
        // An attribute does not show whether it was formatted, so the text alone decides.
        &"None",
        &tracing::field::display("None"),
        &tracing::field::debug("None"),
        &"",
        &tracing::field::display(""),
        &tracing::field::debug(""),
    ];
    for id in values {
        assert_names(id, None);
    }
}

#[test]
fn a_held_span_that_records_no_id_still_waits_for_one() {
    let none: [&dyn Value; 5] = [
        &"",
        &"None",
        &tracing::field::debug(""),
        &tracing::field::debug(None::<&str>),
        &tracing::field::debug(Some("")),
    ];
    for value in none {
        for worker in both_activations(WorkflowContextStorage::new) {
            worker.run(|| {
                info_span!("first", workflow.instance_id = "order").in_scope(|| {});
                let span = info_span!("tagged", workflow.instance_id = Empty).entered();
                span.record("workflow.instance_id", value);
                span.record("workflow.instance_id", tracing::field::debug(Some("order")));
            });
            let first = worker.span("first").span_context;
            assert_continues(&worker.span("tagged"), &first);
        }
    }
}

const ODD_TEXTS: [&str; 24] = [
    "注文-42",
    "заказ",
    "🧾👩\u{200d}👩\u{200d}👧",
    "e\u{301}",
    "\u{301}",
    "\u{202e}txet",
    "\u{feff}",
    "\u{10ffff}",
    " ",
    " padded ",
    "\0",
    "a\0b",
    "\u{7f}\u{80}\u{9f}",
    "\u{1b}[31mred\u{1b}[0m",
    "line\r\nline\ttab",
    "\"",
    "\"open",
    "close\"",
    "in\"side",
    "'",
    "\\",
    "\\\"",
    "\\u{41}",
    "00-00000000000000000000000000000000-0000000000000000-00",
];

#[test]
fn text_in_every_form_is_the_id() {
    for text in ODD_TEXTS {
        assert_names(&text, Some(text));
        assert_names(&tracing::field::display(text), Some(text));
        assert_names(&tracing::field::debug(text), Some(text));
    }
}

#[test]
fn text_that_is_the_debug_form_of_a_string_is_unquoted() {
    for (text, expected) in [
        ("\"quoted\"", "quoted"),
        ("\"\\\"\"", "\""),
        ("\"\\u{7f}\\n\"", "\u{7f}\n"),
    ] {
        assert_names(&text, Some(expected));
    }
    assert_names(&"\"\"", None);
}

#[test]
fn text_that_is_the_debug_form_of_an_option_is_what_is_in_it() {
    assert_names(&tracing::field::debug(Some("some")), Some("some"));
    assert_names(
        &tracing::field::debug(Some(String::from("a \"b\""))),
        Some("a \"b\""),
    );
    assert_names(&tracing::field::debug(Some(Some(42))), Some("42"));
    assert_names(&tracing::field::debug("Some(\"text\")"), Some("text"));
    assert_names(&"Some(text)", Some("text"));
    let longest = "\u{7f}".repeat(MAX_INSTANCE_ID_BYTES);
    assert_names(&tracing::field::debug(Some(&longest)), Some(&longest));
}

#[test]
fn text_that_is_almost_the_debug_form_of_a_string_or_option_is_the_id() {
    for text in [
        "none",
        "Nonesuch",
        "Some",
        "Some(",
        "Something(a)",
        "\"a\"b\"",
        "\"\\\"",
        "\"\\x\"",
        "\"\\u{110000}\"",
        "\"\\u{\"",
        "\"\\u{}\"",
    ] {
        assert_names(&text, Some(text));
    }
}

#[test]
fn ids_up_to_the_limit_are_stored_and_longer_ones_are_counted() {
    for (unit, count, fits) in [
        ("a", 1, true),
        ("a", MAX_INSTANCE_ID_BYTES, true),
        ("a", MAX_INSTANCE_ID_BYTES + 1, false),
        ("é", MAX_INSTANCE_ID_BYTES / 2, true),
        ("é", MAX_INSTANCE_ID_BYTES / 2 + 1, false),
        // Six characters each in its `Debug` form.
        ("\u{7f}", MAX_INSTANCE_ID_BYTES, true),
        ("\u{7f}", MAX_INSTANCE_ID_BYTES + 1, false),
    ] {
        let id = unit.repeat(count);
        let forms: [&dyn Value; 3] = [
            &id,
            &tracing::field::display(&id),
            &tracing::field::debug(&id),
        ];
        for form in forms {
            assert_names(form, Some(id.as_str()).filter(|_| fits));
            in_every_way(|worker, way| {
                worker.run(|| way.tag(form));
                assert_eq!(worker.storage.stats().oversized, u64::from(!fits));
            });
        }
    }
}

#[test]
fn explicit_calls_refuse_an_id_past_the_limit() {
    let worker = Worker::new();
    let storage = &worker.storage;
    worker.run(|| Way::Created.tag(&"a"));
    let context = storage.get("a").unwrap().unwrap();
    let longest = "x".repeat(MAX_INSTANCE_ID_BYTES);
    storage.store(&longest, context.clone()).unwrap();
    let id = "x".repeat(MAX_INSTANCE_ID_BYTES + 1);
    let refusals = [
        storage.store(&id, context).unwrap_err(),
        storage.get(&id).unwrap_err(),
        storage.cleanup(&id).unwrap_err(),
    ];
    for refusal in refusals {
        let length = MAX_INSTANCE_ID_BYTES + 1;
        let expected = InvalidInstanceId::TooLong { length };
        assert!(matches!(&refusal, StorageError::InvalidInstanceId(e) if *e == expected));
        assert!(refusal.to_string().contains("1024"), "{refusal}");
    }
    assert!(storage.create_resumed(&id, None).is_err());
    assert_eq!(storage.stats().oversized, 4);
    assert_bounded(storage);
}

/// Formats as `count` times `chunk`, and counts the bytes that the formatter accepted.
struct Chunks<'a> {
    chunk: &'a str,
    count: usize,
    taken: &'a AtomicUsize,
    /// Whether to continue after the formatter's error.
    stubborn: bool,
}

impl fmt::Display for Chunks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for _ in 0..self.count {
            match f.write_str(self.chunk) {
                Ok(()) => drop(self.taken.fetch_add(self.chunk.len(), Relaxed)),
                Err(_) if self.stubborn => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Runs with a subscriber that exports nothing.
fn unexported(storage: &WorkflowContextStorage, run: impl FnOnce()) {
    let provider = SdkTracerProvider::builder().build();
    let layer = storage.layer(provider.tracer("test"));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), run);
}

#[test]
fn an_id_of_100_megabytes_is_refused_in_every_form() {
    const HUGE: usize = 100 << 20;
    let text = "x".repeat(HUGE);
    let chunk = "y".repeat(1024);
    let taken = AtomicUsize::new(0);
    let [polite, stubborn] = [false, true].map(|stubborn| Chunks {
        chunk: &chunk,
        count: HUGE / chunk.len(),
        taken: &taken,
        stubborn,
    });
    let forms: [&dyn Value; 4] = [
        &text,
        &tracing::field::debug(&text),
        &tracing::field::display(&polite),
        &tracing::field::display(&stubborn),
    ];
    for form in forms {
        let storage = adopting_engines();
        for way in WAYS {
            unexported(&storage, || way.tag(form));
        }
        assert_eq!(storage.instance_ids().len(), 0);
        assert_eq!(storage.stats().oversized, WAYS.len() as u64);
    }
}

#[test]
fn the_layer_stops_reading_a_huge_id_at_the_limit() {
    let read = |way: Way, ours: bool| {
        let taken = AtomicUsize::new(0);
        let huge = Chunks {
            chunk: "0123456789",
            count: 1 << 17,
            taken: &taken,
            stubborn: false,
        };
        let id = tracing::field::display(&huge);
        if ours {
            unexported(&adopting_engines(), || way.tag(&id));
        } else {
            let provider = SdkTracerProvider::builder().build();
            let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
            let subscriber = Dispatch::new(tracing_subscriber::registry().with(layer));
            tracing::dispatcher::with_default(&subscriber, || way.tag(&id));
        }
        taken.into_inner()
    };
    for way in WAYS {
        let (plain, ours) = (read(way, false), read(way, true));
        // The `Debug` form of an id is up to six times as long.
        assert!(
            ours - plain <= 8 * MAX_INSTANCE_ID_BYTES,
            "{way:?}: {plain}, {ours}"
        );
    }
}

#[test]
fn later_ids_on_a_span_are_ignored() {
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            let span = info_span!("tagged", workflow.instance_id = Empty).entered();
            for n in 0..1_000 {
                span.record("workflow.instance_id", "x".repeat(2_000));
                span.record("workflow.instance_id", format!("order-{n}"));
                span.record("workflow.instance_id", n);
            }
            inner();
        });
        worker.forest().assert_one_trace().assert_no_orphans();
        let tagged = worker.span("tagged").span_context;
        assert_same_span(&worker.stored("order-0"), &tagged);
        assert_eq!(worker.storage.stats().oversized, 1_000);
        assert_bounded(&worker.storage);
    }
}

struct Panicking;

impl fmt::Display for Panicking {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("an id that cannot be printed")
    }
}

#[test]
fn the_layer_works_after_a_panic_while_formatting_an_id() {
    in_every_way(|worker, way| {
        worker.run(|| {
            let tag = || way.tag(&tracing::field::display(Panicking));
            catch_unwind(AssertUnwindSafe(tag)).unwrap_err();
        });
        assert_eq!(worker.storage.instance_ids().len(), 0);
        assert_works(worker);
    });
}

#[test]
fn a_held_span_stays_held_when_the_id_of_its_child_panics() {
    for worker in both_activations(adopting_engines) {
        worker.run(|| {
            let engine = info_span!("engine").entered();
            let tag = || Way::Created.tag(&tracing::field::display(Panicking));
            catch_unwind(AssertUnwindSafe(tag)).unwrap_err();
            Way::Created.tag(&"a");
            drop(engine);
        });
        assert_eq!(worker.storage.stats().adopted, 1);
        assert_eq!(
            worker.span("tagged").span_context.trace_id(),
            worker.stored_trace("a")
        );
        assert_works(&worker);
    }
}

#[test]
fn nothing_is_recorded_while_telemetry_is_suppressed() {
    in_every_way(|worker, way| {
        worker.run(|| {
            let _suppressed = Context::enter_telemetry_suppressed_scope();
            way.tag(&"order");
            assert!(!Context::current().span().span_context().is_valid());
        });
        assert_eq!(worker.spans().len(), 0);
        let stats = worker.storage.stats();
        assert_eq!((stats.stored_instances, stats.misses), (0, 0));
        assert_works(worker);
    });
}

#[test]
fn oversized_run_and_parent_ids_are_ignored() {
    let huge = "x".repeat(MAX_INSTANCE_ID_BYTES + 1);
    for worker in both_activations(WorkflowContextStorage::new) {
        for _ in 0..2 {
            worker.run(|| {
                let span = info_span!(
                    "tagged",
                    workflow.instance_id = "a",
                    workflow.run_id = huge,
                    workflow.parent_instance_id = huge,
                );
                span.in_scope(inner);
            });
        }
        worker.forest().assert_one_trace().assert_no_orphans();
        assert_eq!(worker.storage.instance_ids(), ["a"]);
        assert_eq!(worker.storage.stats().oversized, 2);
    }
}

#[test]
fn replay_and_status_fields_of_any_type_are_harmless() {
    let huge = "x".repeat(1 << 20);
    let values: [&dyn Value; 9] = [
        &"false",
        &"FALSE",
        &"maybe",
        &false,
        &1_i64,
        &f64::NAN,
        &Empty,
        &huge,
        &tracing::field::debug(&huge),
    ];
    for value in values {
        for worker in both_activations(WorkflowContextStorage::new) {
            worker.run(|| {
                let span = info_span!(
                    "odd",
                    workflow.instance_id = "a",
                    workflow.replaying = value,
                    workflow.status = value,
                );
                span.in_scope(inner);
                span.record("workflow.status", value);
                span.record("workflow.replaying", value);
            });
            assert_eq!(
                worker.span("odd").span_context.trace_id(),
                worker.stored_trace("a")
            );
            assert_bounded(&worker.storage);
        }
    }
}

/// Texts full of characters that `Debug` escapes, some near the length limit.
fn texts() -> impl Strategy<Value = String> {
    let odd = prop::sample::select(vec![
        '"', '\'', '\\', '\n', '\0', '\u{7f}', '\u{301}', 'u', '{',
    ]);
    let chars = prop_oneof![any::<char>(), odd, prop::char::range('a', 'z')];
    let short = prop::collection::vec(chars.clone(), 1..20);
    let long = prop::collection::vec(chars, 300..1_100);
    prop_oneof![8 => short, 1 => long].prop_map(String::from_iter)
}

fn is_quoted(text: &str) -> bool {
    text.len() >= 2 && text.starts_with('"') && text.ends_with('"')
}

#[test]
fn the_same_text_in_any_form_names_the_same_instance() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    };
    let texts = texts().prop_filter("quoted text is unquoted", |text| !is_quoted(text));
    let result = TestRunner::new_with_rng(config, rng).run(&texts, |text| {
        let worker = Worker::with_storage(adopting_engines());
        let forms: [&dyn Value; 3] = [
            &text,
            &tracing::field::display(&text),
            &tracing::field::debug(&text),
        ];
        for way in WAYS {
            forms.iter().for_each(|form| worker.run(|| way.tag(form)));
        }
        let fits = text.len() <= MAX_INSTANCE_ID_BYTES;
        let found = worker.storage.get(&text).is_ok_and(|found| found.is_some());
        prop_assert_eq!(found, fits);
        prop_assert_eq!(worker.storage.instance_ids().len(), usize::from(fits));
        Ok(())
    });
    result.unwrap();
}
