//! Redis and PostgreSQL through this crate, beside their own clients used as well as they can be by hand: what a miss waits
//! for, and what it takes until another worker goes on with 100,000 instances.

use std::hint::black_box;

use redis::Connection;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, Statement};

use super::servers::support::{PostgresServer, RedisServer, Server as _, patient};
use super::servers::{Worker, microseconds, on, on_redis};
use crate::report::{Bench, Case, by_turns};
use crate::{Times, id};

const ROUNDS: usize = 5;

/// How many instances are asked for in a round, each of which waits for the server.
const ASKED: usize = 5_000;

/// How many instances are handed over in a round.
const HANDED_OVER: usize = 100_000;

/// How many writes go to the server at once, as this crate's do at most.
const GROUP: usize = 1_000;

/// A day, in milliseconds.
const LIFETIME: i64 = 24 * 60 * 60 * 1_000;

/// As long as this crate's own form of a record.
const RECORD: [u8; 100] = [7; 100];

/// Two workers with one server between them.
trait Workers {
    fn name(&self) -> &'static str;

    /// Has a worker look for an instance.
    fn finds(&mut self, worker: usize, id: &str) -> bool;

    /// Has the first worker record new instances, which it looks for before, until all are on the server.
    fn record(&mut self, ids: &[String]);
}

pub(crate) fn clients(bench: &mut Bench) {
    let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
    let mut servers: [(&str, Vec<Box<dyn Workers>>); 2] = [
        (
            "Redis",
            vec![
                Box::new(Ours::new("ours", || {
                    Worker::new(patient(on_redis(&redis.url())))
                })),
                Box::new(ByRedis::new(&redis.url())),
            ],
        ),
        (
            "PostgreSQL",
            vec![
                Box::new(Ours::new("ours", || {
                    Worker::new(patient(on(&postgres.url())))
                })),
                Box::new(Ours::new("ours, direct", || {
                    Worker::new(patient(on(&postgres.url()).direct(true)))
                })),
                Box::new(ByPostgres::new(&postgres.url())),
            ],
        ),
    ];
    let (rounds, asked, handed_over) = bench.unless_test((ROUNDS, ASKED, HANDED_OVER), (1, 10, 10));
    let mut recorded = 0;
    let mut ids = |number| -> Vec<_> {
        recorded += number;
        (recorded - number..recorded).map(id).collect()
    };
    for (server, subjects) in &mut servers {
        let mut tell = |what: &str, rounds, run: &mut dyn FnMut(&mut dyn Workers) -> f64| {
            let run = |workers: &mut Box<dyn Workers>| run(&mut **workers);
            let results = by_turns(rounds, subjects, |s| s.name().to_owned(), run);
            let what = format!("{server} {what}");
            let case = Case {
                what: &what,
                size: 0,
                threads: 1,
            };
            bench.tell(case, "us", "its client", &results);
        };
        tell("lookup on a miss", rounds, &mut |workers| {
            let ids = ids(asked);
            let times = Times::of(|| {
                for id in &ids {
                    assert!(!workers.finds(0, black_box(id)));
                }
            });
            microseconds(&times, ids.len())
        });
        tell("two workers handing over", 1, &mut |workers| {
            let ids = ids(handed_over);
            let times = Times::of(|| {
                workers.record(&ids);
                for id in &ids {
                    assert!(workers.finds(1, black_box(id)));
                }
            });
            microseconds(&times, ids.len())
        });
    }
}

struct Ours {
    name: &'static str,
    workers: [Worker; 2],
}

impl Ours {
    fn new(name: &'static str, open: impl Fn() -> Worker) -> Self {
        Self {
            name,
            workers: [open(), open()],
        }
    }
}

impl Workers for Ours {
    fn name(&self) -> &'static str {
        self.name
    }

    fn finds(&mut self, worker: usize, id: &str) -> bool {
        self.workers[worker].trace(id).is_some()
    }

    fn record(&mut self, ids: &[String]) {
        ids.iter().for_each(|id| self.workers[0].span(id));
        self.workers[0].flush();
    }
}

/// The `redis` crate, with the commands of `RedisBackend`.
struct ByRedis([Connection; 2]);

impl ByRedis {
    fn new(url: &str) -> Self {
        let client = redis::Client::open(url).expect("a URL");
        Self([0, 1].map(|_| client.get_connection().expect("the server works")))
    }
}

impl Workers for ByRedis {
    fn name(&self) -> &'static str {
        "its client"
    }

    fn finds(&mut self, worker: usize, id: &str) -> bool {
        let mut lookup = redis::pipe();
        lookup.cmd("GETRANGE").arg(id).arg(0).arg(256 * 1024);
        lookup.cmd("PTTL").arg(id);
        let found = lookup.query(&mut self.0[worker]);
        let (record, _): (Vec<u8>, i64) = found.expect("the server works");
        !record.is_empty()
    }

    fn record(&mut self, ids: &[String]) {
        for group in ids.chunks(GROUP) {
            let mut claims = redis::pipe();
            for id in group {
                assert!(!self.finds(0, id));
                let claim = claims.cmd("SET").arg(id).arg(&RECORD[..]);
                claim.arg("PX").arg(LIFETIME).arg("NX").ignore();
            }
            let claimed: redis::RedisResult<()> = claims.query(&mut self.0[0]);
            claimed.expect("the server works");
        }
    }
}

/// `tokio-postgres`, with statements that it prepares itself, which needs a session of the server for each client.
struct ByPostgres {
    runtime: Runtime,
    clients: [(Client, Statement); 2],
}

impl ByPostgres {
    fn new(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.expect("a runtime");
        let clients = [0, 1].map(|_| {
            runtime.block_on(async {
                let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
                tokio::spawn(connection);
                let table = "CREATE TABLE IF NOT EXISTS by_hand \
                     (key text PRIMARY KEY, record bytea NOT NULL, expires_at timestamptz NOT NULL)";
                client.batch_execute(table).await?;
                let find = "SELECT record, expires_at - now() < interval '1 day' \
                     FROM by_hand WHERE key = $1 AND expires_at > now()";
                let find = client.prepare(find).await?;
                Ok::<_, tokio_postgres::Error>((client, find))
            })
        });
        Self {
            runtime,
            clients: clients.map(|client| client.expect("the server works")),
        }
    }
}

impl Workers for ByPostgres {
    fn name(&self) -> &'static str {
        "its client"
    }

    fn finds(&mut self, worker: usize, id: &str) -> bool {
        let (client, find) = &self.clients[worker];
        let found = self.runtime.block_on(client.query_opt(find, &[&id]));
        found.expect("the server works").is_some()
    }

    fn record(&mut self, ids: &[String]) {
        for group in ids.chunks(GROUP) {
            for id in group {
                assert!(!self.finds(0, id));
            }
            let (client, _) = &self.clients[0];
            let claim = "INSERT INTO by_hand \
                 SELECT key, $2, now() + $3 * interval '1 millisecond' FROM unnest($1::text[]) AS key \
                 ON CONFLICT DO NOTHING";
            let (record, lifetime) = (&RECORD[..], LIFETIME as f64);
            let claimed = async { client.execute(claim, &[&group, &record, &lifetime]).await };
            let claimed = self.runtime.block_on(claimed).expect("the server works");
            assert_eq!(claimed, group.len() as u64);
        }
    }
}
