//! `TraceForest` draws exported spans, asserts on them, and accepts any input.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer, TracerProvider,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, SdkTracerProvider, SpanData, SpanEvents, SpanLinks,
};
use tracing_workflow_context::testing::TraceForest;

const A: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
const B: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;

#[test]
fn an_empty_forest_is_drawn_as_no_spans() {
    let forest = TraceForest::from_spans(&[]);

    assert_eq!(forest.to_string(), "no spans");
    assert_eq!((forest.trace_count(), forest.span_count()), (0, 0));
    assert_eq!(forest.trace_ids(), []);
    assert_eq!(forest.spans().count(), 0);
    assert!(forest.count_by_name().is_empty());
    forest.assert_no_orphans().assert_no_duplicates();
}

#[test]
fn trees_are_drawn_in_order_of_start_whatever_the_order_of_export() {
    let forest = TraceForest::from_spans(&[
        span(B, 0xe457_b5a2_e4d8_6bd1, 0, "poll").at(5_000, 7_000),
        span(A, 0x5399_5c3f_42cd_8ad8, ROOT, "charge_card").at(6_000, 11_000),
        span(A, 0xb7ad_6b71_6920_3331, ROOT, "charge_card")
            .at(1_000, 5_100)
            .failed("card declined"),
        span(A, 0xd759_7dee_0000_0001, 0x5399_5c3f_42cd_8ad8, "http").at(7_000, 8_000),
        span(A, ROOT, 0, "run_order").at(0, 12_300),
    ]);

    assert_eq!(
        forest.to_string(),
        "\
trace 4bf92f35…  (4 spans, 12.3ms)
└─ run_order  12.3ms  00f067aa…
   ├─ charge_card  4.1ms  b7ad6b71…  (error: card declined)
   └─ charge_card  5.0ms  53995c3f…
      └─ http  1.0ms  d7597dee…

trace 0af76519…  (1 span, 2.0ms)
└─ poll  2.0ms  e457b5a2…"
    );
    assert_eq!(
        forest.trace_ids(),
        [
            TraceId::from_bytes(A.to_be_bytes()),
            TraceId::from_bytes(B.to_be_bytes())
        ]
    );
    assert_eq!((forest.trace_count(), forest.span_count()), (2, 5));
    let names: Vec<_> = forest.spans().map(|span| &*span.name).collect();
    assert_eq!(
        names,
        ["run_order", "charge_card", "charge_card", "http", "poll"]
    );
}

#[test]
fn siblings_that_start_together_are_ordered_by_span_id() {
    let forest =
        TraceForest::from_spans(&[span(A, 3, 0, "c"), span(A, 1, 0, "a"), span(A, 2, 0, "b")]);

    let names: Vec<_> = forest.spans().map(|span| &*span.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn a_missing_parent_is_noted() {
    let forest = TraceForest::from_spans(&[
        span(A, 0x11 << 56, 0x00f0_67aa << 32, "local").at(0, 1_000),
        span(A, 0x22 << 56, 0x00f0_67aa << 32, "remote")
            .at(1_000, 2_000)
            .remote(),
    ]);

    assert_eq!(
        forest.to_string(),
        "\
trace 4bf92f35…  (2 spans, 2.0ms)
├─ local  1.0ms  11000000…  (parent 00f067aa… not exported)
└─ remote  1.0ms  22000000…  (remote parent 00f067aa…)"
    );
}

#[test]
fn links_show_their_target_relation_and_name() {
    let forest = TraceForest::from_spans(&[
        span(A, 0x11 << 56, 0, "poll")
            .at(0, 1_000)
            .link(B, 0x33 << 56, None),
        span(A, 0x22 << 56, 0x11 << 56, "task")
            .at(0, 1_000)
            .link(A, 0x11 << 56, Some("foreign"))
            .link(B, 0x44 << 56, Some("late")),
    ]);

    assert_eq!(
        forest.to_string(),
        "\
trace 4bf92f35…  (2 spans, 1.0ms)
└─ poll  1.0ms  11000000…
   │  ⇢ link to 0af76519…/33000000…
   └─ task  1.0ms  22000000…
         ⇢ link to 4bf92f35…/11000000… [foreign] poll
         ⇢ link to 0af76519…/44000000… [late]"
    );
}

#[test]
fn ids_that_differ_only_at_their_end_are_drawn_differently() {
    let forest = TraceForest::from_spans(&[span(1, 2, 3, "counted")]);

    let drawing = forest.to_string();
    assert!(drawing.starts_with("trace …00000001  "), "{drawing}");
    assert!(
        drawing.ends_with("…00000002  (parent …00000003 not exported)"),
        "{drawing}"
    );
}

#[test]
fn names_cannot_break_the_drawing() {
    let mut hostile =
        span(A, 1, 0, "two\nlines \u{1b}[31m \u{202e}und \"Grüße\" \\").failed("a\tb\0");
    hostile.links.links.push(link(A, 1, Some("x\r\ny")));
    let drawing = TraceForest::from_spans(&[hostile, span(A, 2, 0, "")]).to_string();

    assert!(
        drawing.contains("two\\nlines \\u{1b}[31m \\u{202e}und \"Grüße\" \\  "),
        "{drawing}"
    );
    assert!(drawing.contains("(error: a\\tb\\u{0})"), "{drawing}");
    assert!(drawing.contains("[x\\r\\ny] two\\nlines"), "{drawing}");
    assert_eq!(drawing.lines().count(), 4, "{drawing}");
}

#[test]
fn durations_are_readable_and_may_be_negative() {
    const S: i64 = 1_000_000;
    for (end, drawn) in [
        (0, "0.0ns"),
        (950, "950.0µs"),
        (1_500_000, "1.5s"),
        (125 * S, "2m 05s"),
        (3_660 * S, "1h 01m"),
        (277_200 * S, "3d 05h"),
        (-5_000, "-5.0ms"),
    ] {
        let drawing = TraceForest::from_spans(&[span(A, 1, 0, "work").at(0, end)]).to_string();
        assert!(drawing.contains(&format!("(1 span, {drawn})")), "{drawing}");
        assert!(drawing.contains(&format!("work  {drawn}  ")), "{drawing}");
    }
}

#[test]
fn an_error_without_a_description_is_noted() {
    let drawing = TraceForest::from_spans(&[span(A, 1, 0, "work").failed("")]).to_string();

    assert!(drawing.ends_with("  (error)"), "{drawing}");
}

#[test]
fn walking_finds_names_and_parents() {
    let spans = [
        span(A, 1, 0, "root").at(0, 9),
        span(A, 2, 1, "child").at(1, 9).remote(),
        span(A, 3, 99, "orphan").at(2, 9),
        span(B, 2, 1, "elsewhere").at(3, 9),
        span(A, 4, 2, "child").at(4, 9),
    ];
    let forest = TraceForest::from_spans(&spans);

    let child = forest.find("child").expect("was given");
    assert_eq!(child, &spans[1]);
    assert_eq!(forest.parent_of(child), forest.find("root"));
    assert_eq!(forest.parent_of(&spans[4]), Some(child));
    assert_eq!(forest.parent_of(&spans[0]), None);
    assert_eq!(forest.parent_of(&spans[2]), None);
    assert_eq!(
        forest.parent_of(&spans[3]),
        None,
        "span ids of another trace do not count"
    );
    assert_eq!(forest.find("nobody"), None);
    let counts: Vec<_> = forest.count_by_name().into_iter().collect();
    let expected = [("child", 2), ("elsewhere", 1), ("orphan", 1), ("root", 1)];
    assert_eq!(counts, expected.map(|(name, n)| (name.to_owned(), n)));
}

#[test]
fn assert_one_trace_passes_and_fails() {
    let forest = TraceForest::from_spans(&[span(A, 1, 0, "one"), span(A, 2, 0, "two")]);
    assert_eq!(forest.assert_one_trace().span_count(), 2);

    let forest = TraceForest::from_spans(&[span(A, 1, 0, "one"), span(B, 2, 0, "two")]);
    assert_fails(&forest, "expected one trace, found 2:", |forest| {
        forest.assert_one_trace();
    });

    let forest = TraceForest::from_spans(&[]);
    assert_fails(&forest, "expected one trace, found 0:", |forest| {
        forest.assert_one_trace();
    });
}

#[test]
fn assert_no_orphans_passes_and_fails() {
    let whole = [
        span(A, 1, 0, "root"),
        span(A, 2, 1, "child"),
        span(A, 3, 1, "far").remote(),
    ];
    assert_eq!(
        TraceForest::from_spans(&whole)
            .assert_no_orphans()
            .span_count(),
        3
    );

    let forest = TraceForest::from_spans(&whole[1..]);
    assert_fails(
        &forest,
        "expected the parent of every span, but 2 are missing:",
        |forest| {
            forest.assert_no_orphans();
        },
    );

    let elsewhere = [span(B, 1, 0, "root"), span(A, 2, 1, "child")];
    let forest = TraceForest::from_spans(&elsewhere);
    assert_fails(
        &forest,
        "expected the parent of every span, but 1 is missing:",
        |forest| {
            forest.assert_no_orphans();
        },
    );
}

#[test]
fn assert_no_duplicates_passes_and_fails() {
    let retried = [
        span(A, 1, 0, "root"),
        span(A, 2, 1, "charge"),
        span(A, 3, 1, "charge"),
        span(B, 1, 0, "other trace, same span id"),
    ];
    assert_eq!(
        TraceForest::from_spans(&retried)
            .assert_no_duplicates()
            .span_count(),
        4
    );

    let forest = TraceForest::from_spans(&[retried.as_slice(), &retried[1..2]].concat());
    assert_fails(
        &forest,
        "expected every span id once, but 1 span repeats one:",
        |forest| {
            forest.assert_no_duplicates();
        },
    );
    let drawing = forest.to_string();
    assert_eq!(
        drawing.matches("(repeated span id)").count(),
        1,
        "{drawing}"
    );
}

#[test]
fn failures_point_at_the_test() {
    let location = std::sync::Arc::new(std::sync::Mutex::new(None));
    let seen = location.clone();
    let this = std::thread::current().id();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().id() == this {
            *seen.lock().unwrap() = info.location().map(|at| at.file().to_owned());
        }
        before(info);
    }));
    catch_unwind(|| {
        TraceForest::from_spans(&[]).assert_one_trace();
    })
    .expect_err("there is no trace");

    let file = location.lock().unwrap().take().expect("panicked");
    assert!(file.ends_with("trace_forest.rs"), "{file}");
}

#[test]
fn cycles_of_parents_are_drawn_once_and_can_be_walked() {
    let spans = [
        span(A, 1, 1, "own parent").at(0, 9),
        span(A, 2, 4, "first").at(1, 9),
        span(A, 3, 2, "second").at(2, 9),
        span(A, 4, 3, "third").at(3, 9),
        span(A, 5, 6, "hangs off a cycle").at(0, 9),
        span(A, 6, 7, "early").at(4, 9),
        span(A, 7, 6, "late").at(5, 9),
    ];
    let forest = TraceForest::from_spans(&spans);
    forest.assert_no_orphans();

    let drawing = forest.to_string();
    assert_eq!(forest.span_count(), 7, "{drawing}");
    assert_eq!(drawing.lines().count(), 8, "{drawing}");
    assert_eq!(drawing.matches("in a cycle)").count(), 3, "{drawing}");
    for span in forest.spans() {
        let ancestors = std::iter::successors(Some(span), |span| forest.parent_of(span));
        assert!(ancestors.take(8).count() < 8, "{drawing}");
    }
    assert_eq!(forest.parent_of(&spans[4]), Some(&spans[5]));
}

#[test]
fn repeated_ids_share_their_children_out_to_the_earliest() {
    let forest = TraceForest::from_spans(&[
        span(A, 1, 0, "again").at(5, 9),
        span(A, 1, 0, "first").at(0, 9),
        span(A, 2, 1, "child").at(6, 9),
        span(A, 1, 1, "again, and below itself").at(7, 9),
    ]);

    let names: Vec<_> = forest.spans().map(|span| &*span.name).collect();
    assert_eq!(
        names,
        ["first", "child", "again, and below itself", "again"],
        "{forest}"
    );
    let child = forest.find("child").expect("was given");
    assert_eq!(forest.parent_of(child), forest.find("first"));
}

#[test]
fn thousands_of_children_are_drawn_quickly() {
    let children = (2..=20_000).map(|id| span(A, id, 1, "child").at(id as i64, 0));
    let spans: Vec<_> = std::iter::once(span(A, 1, 0, "root"))
        .chain(children)
        .collect();
    let forest = TraceForest::from_spans(&spans);

    forest
        .assert_one_trace()
        .assert_no_orphans()
        .assert_no_duplicates();
    assert_eq!(forest.to_string().lines().count(), 20_001);
}

#[test]
fn deep_nesting_is_drawn_quickly() {
    const DEPTH: u64 = 100_000;
    let mut spans: Vec<_> = (1..=DEPTH)
        .map(|id| span(A, id, id - 1, "deeper"))
        .collect();
    spans.reverse();
    let forest = TraceForest::from_spans(&spans);

    forest
        .assert_one_trace()
        .assert_no_orphans()
        .assert_no_duplicates();
    let drawing = forest.to_string();
    assert_eq!(drawing.lines().count() as u64, DEPTH + 1);
    assert!(
        drawing.len() < 20_000_000,
        "linear in the number of spans, not {}",
        drawing.len()
    );
    assert!(drawing.contains("[depth 99999] └─ deeper"));
    let climbed = std::iter::successors(Some(&spans[0]), |span| forest.parent_of(span)).count();
    assert_eq!(climbed as u64, DEPTH);

    // The same chain closed to a cycle.
    spans.last_mut().expect("not empty").parent_span_id = SpanId::from_bytes(DEPTH.to_be_bytes());
    let forest = TraceForest::from_spans(&spans);
    assert_eq!(forest.to_string().lines().count() as u64, DEPTH + 1);
}

#[test]
fn invalid_ids_are_drawn_like_any_other() {
    let forest = TraceForest::from_spans(&[span(0, 0, 0, "nothing"), span(0, 0, 0, "nothing")]);

    forest.assert_one_trace().assert_no_orphans();
    assert_eq!(forest.to_string().lines().count(), 3);
}

#[test]
fn spans_exported_by_the_sdk_are_drawn() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let tracer = provider.tracer("test");
    tracer.in_span("root", |cx| {
        let linked = tracer
            .span_builder("linked")
            .with_links(vec![Link::with_context(cx.span().span_context().clone())]);
        drop(tracer.build_with_context(linked, &Context::current()));
    });
    let forest = TraceForest::from_spans(&exporter.get_finished_spans().expect("exported"));

    forest
        .assert_one_trace()
        .assert_no_orphans()
        .assert_no_duplicates();
    let linked = forest.find("linked").expect("was exported");
    assert_eq!(forest.parent_of(linked), forest.find("root"));
    assert!(forest.to_string().ends_with(" root"), "{forest}");
}

const ROOT: u64 = 0x00f0_67aa_0ba9_02b7;

fn span(trace: u128, id: u64, parent: u64, name: &'static str) -> SpanData {
    SpanData {
        span_context: context(trace, id),
        parent_span_id: SpanId::from_bytes(parent.to_be_bytes()),
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: Cow::Borrowed(name),
        start_time: SystemTime::UNIX_EPOCH,
        end_time: SystemTime::UNIX_EPOCH,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::default(),
    }
}

fn context(trace: u128, id: u64) -> SpanContext {
    SpanContext::new(
        TraceId::from_bytes(trace.to_be_bytes()),
        SpanId::from_bytes(id.to_be_bytes()),
        TraceFlags::SAMPLED,
        false,
        TraceState::default(),
    )
}

fn link(trace: u128, id: u64, relation: Option<&'static str>) -> Link {
    let attributes = relation.map(|relation| KeyValue::new("workflow.relation", relation));
    Link::new(context(trace, id), attributes.into_iter().collect(), 0)
}

trait SpanDataExt: Sized {
    /// Start and end in microseconds; the end may come first.
    fn at(self, start: i64, end: i64) -> Self;
    fn failed(self, description: &'static str) -> Self;
    fn remote(self) -> Self;
    fn link(self, trace: u128, id: u64, relation: Option<&'static str>) -> Self;
}

impl SpanDataExt for SpanData {
    fn at(mut self, start: i64, end: i64) -> Self {
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(43_200);
        let time = |micros: i64| {
            let distance = Duration::from_micros(micros.unsigned_abs());
            if micros < 0 {
                noon - distance
            } else {
                noon + distance
            }
        };
        self.start_time = time(start);
        self.end_time = time(end);
        self
    }

    fn failed(mut self, description: &'static str) -> Self {
        self.status = Status::error(description);
        self
    }

    fn remote(mut self) -> Self {
        self.parent_span_is_remote = true;
        self
    }

    fn link(mut self, trace: u128, id: u64, relation: Option<&'static str>) -> Self {
        self.links.links.push(link(trace, id, relation));
        self
    }
}

/// The message must hold the reason, then the drawing.
fn assert_fails(forest: &TraceForest, reason: &str, assertion: impl FnOnce(&TraceForest)) {
    let panic = catch_unwind(AssertUnwindSafe(|| assertion(forest))).expect_err("should fail");
    let message = panic.downcast_ref::<String>().expect("a formatted message");
    assert_eq!(message.trim_end(), format!("{reason}\n\n{forest}"));
}
