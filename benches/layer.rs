//! What one span costs from its creation to its close, rung by rung. Spans are exported to nobody.
#![allow(missing_docs, reason = "criterion's macros declare functions")]

mod support;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use support::Rung;

fn ladder(criterion: &mut Criterion) {
    let mut ladder = criterion.benchmark_group("layer");
    ladder
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500));
    for (name, rung) in Rung::ALL {
        ladder.bench_function(name, |bencher| rung.climb(|life| bencher.iter(life)));
    }
    ladder.finish();
}

criterion_group!(benches, ladder);
criterion_main!(benches);
