//! Redis Cluster: an instance is on one node, and is independent of the others.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use redis::Value;
use tracing_workflow_context::backend::Write;
use tracing_workflow_context::{ConnectError, Form, RedisBackend, WorkflowContextStorage};

use super::*;

const SLOTS: usize = 16_384;

/// A Cluster of masters with equal shares of the slots, and replicas of the first.
struct Cluster {
    nodes: Vec<RedisServer>,
    directories: Vec<Directory>,
    patience: Duration,
}

impl Cluster {
    fn start() -> Self {
        // No node may be considered failed because the machine is busy.
        Self::with_replicas(0, Duration::from_secs(15))
    }

    /// Starts a Cluster whose nodes consider each other failed after that time.
    fn with_replicas(replicas: usize, patience: Duration) -> Self {
        const MASTERS: usize = 3;
        let directories: Vec<_> = (0..MASTERS + replicas).map(|_| Directory::new()).collect();
        let start =
            |directory: &Directory| RedisServer::start_in_cluster(directory.path(), patience);
        let nodes = directories.iter().map(start).collect();
        let cluster = Self {
            nodes,
            directories,
            patience,
        };
        for (number, node) in cluster.nodes.iter().enumerate() {
            let mut epoch = redis::cmd("CLUSTER");
            cluster.ask(number, epoch.arg("SET-CONFIG-EPOCH").arg(number + 1));
            if number < MASTERS {
                let mut share = redis::cmd("CLUSTER");
                share.arg("ADDSLOTSRANGE");
                share.arg(SLOTS * number / MASTERS);
                share.arg(SLOTS * (number + 1) / MASTERS - 1);
                cluster.ask(number, &share);
            }
            if number > 0 {
                let info: String = text(cluster.ask(number, redis::cmd("CLUSTER").arg("NODES")));
                let bus = info.split_once('@').expect("its address").1;
                let bus = bus.split([',', ' ']).next().expect("a port");
                let mut meet = redis::cmd("CLUSTER");
                meet.arg("MEET").arg("127.0.0.1").arg(node.port()).arg(bus);
                cluster.ask(0, &meet);
            }
        }
        for replica in MASTERS..MASTERS + replicas {
            cluster.until("the replica knows its master", || {
                let mut follow = redis::cmd("CLUSTER");
                follow.arg("REPLICATE").arg(cluster.id(0));
                raw(&cluster.nodes[replica]).req(&follow).is_ok()
            });
        }
        for number in 0..cluster.nodes.len() {
            cluster.until("everybody knows everybody", || {
                let info = text(cluster.ask(number, redis::cmd("CLUSTER").arg("INFO")));
                let slots = cluster.ask(number, redis::cmd("CLUSTER").arg("SLOTS"));
                let Value::Array(ranges) = slots else {
                    panic!("{slots:?}")
                };
                let are_known = format!("cluster_known_nodes:{}\r", cluster.nodes.len());
                let has_replicas = ranges.iter().any(
                    |range| matches!(range, Value::Array(range) if range.len() == 3 + replicas),
                );
                info.contains("cluster_state:ok")
                    && info.contains(&are_known)
                    && ranges.len() == MASTERS
                    && has_replicas
            });
        }
        cluster
    }

    fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(RedisServer::url).collect()
    }

    fn backend(&self) -> RedisBackend {
        let urls = self.urls();
        let backend = RedisBackend::connect_cluster(urls.iter().map(String::as_str));
        backend
            .expect("URLs")
            .with_connect_timeout(PATIENCE)
            .with_response_timeout(PATIENCE)
    }

    #[track_caller]
    fn ask(&self, number: usize, command: &redis::Cmd) -> Value {
        raw(&self.nodes[number]).req(command).expect("a reply")
    }

    fn id(&self, number: usize) -> String {
        text(self.ask(number, redis::cmd("CLUSTER").arg("MYID")))
    }

    fn keys(&self, number: usize) -> Vec<String> {
        match self.ask(number, redis::cmd("KEYS").arg("*")) {
            Value::Array(keys) => keys.into_iter().map(text).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn slot(&self, key: &str) -> usize {
        match self.ask(1, redis::cmd("CLUSTER").arg("KEYSLOT").arg(key)) {
            Value::Int(slot) => slot as usize,
            other => panic!("{other:?}"),
        }
    }

    /// Returns the first ids that belong to that node.
    fn ids_on(&self, number: usize, count: usize) -> Vec<String> {
        let share = SLOTS * number / 3..SLOTS * (number + 1) / 3;
        let ids = (0..).map(|n| format!("order-{n}"));
        let lies_there = |id: &String| share.contains(&self.slot(&format!("{{{id}}}")));
        ids.filter(lies_there).take(count).collect()
    }

    fn start_again(&mut self, number: usize) {
        self.nodes[number].start_again_in_cluster(self.directories[number].path(), self.patience);
    }

    #[track_caller]
    fn until(&self, what: &str, is_so: impl FnMut() -> bool) {
        wait_until(what, is_so);
    }
}

/// Calls `req_command`, whose name is ambiguous on `redis::Connection` otherwise.
trait Req {
    fn req(&mut self, command: &redis::Cmd) -> redis::RedisResult<Value>;
}

impl Req for redis::Connection {
    fn req(&mut self, command: &redis::Cmd) -> redis::RedisResult<Value> {
        command.query(self)
    }
}

fn text(value: Value) -> String {
    match value {
        Value::BulkString(text) => String::from_utf8(text).expect("text"),
        Value::SimpleString(text) => text,
        Value::VerbatimString { text, .. } => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cluster_fulfils_the_contract() {
    for form in [Form::Binary, Form::Json] {
        let cluster = Cluster::start();
        assert_fulfils_the_contract(form, || cluster.backend());
        for number in 0..3 {
            assert!(!cluster.keys(number).is_empty(), "nothing is on {number}");
        }
    }
}

#[test]
fn an_instance_is_in_one_slot_and_instances_are_on_all_nodes() {
    let cluster = Cluster::start();
    let backend = cluster.backend();
    let record = record(PARENT);
    let mut ids: Vec<_> = (0..3_000).map(|n| format!("order-{n}")).collect();
    let strange = [
        "}",
        "}}",
        "{",
        "{}",
        "}{",
        "{a}b",
        "a}b",
        "a{b}c",
        "}a",
        "\u{1e}",
        "\u{1e}}",
        "\u{1e}\u{1e}}",
        "{}}",
        " ",
        "ü}",
    ];
    ids.extend(strange.map(str::to_owned));
    let keys_of =
        |id: &str| ["", "\u{1f}run", "\u{1f}\u{1f}0123}{run"].map(|rest| format!("{id}{rest}"));
    let writes: Vec<_> = ids
        .iter()
        .flat_map(|id| keys_of(id).map(|key| claim(&key, &record)))
        .collect();
    assert!(
        backend
            .write_all(&writes)
            .unwrap()
            .iter()
            .all(|o| o.existing().is_none())
    );
    assert!(
        backend
            .write_all(&writes)
            .unwrap()
            .iter()
            .all(|o| o.existing().is_some())
    );

    let on: [Vec<String>; 3] = [0, 1, 2].map(|number| cluster.keys(number));
    assert_eq!(on.iter().map(Vec::len).sum::<usize>(), writes.len());
    for keys in &on {
        assert!(
            keys.len() > writes.len() / 4,
            "of {}: {}",
            writes.len(),
            keys.len()
        );
    }
    // According to the server.
    let prefix = "workflow-context:";
    for id in strange.iter().copied().chain(["order-1", "order-2"]) {
        let escaped = id.replace('\u{1e}', "\u{1e}=");
        let escaped = escaped.replace('{', "\u{1e}<").replace('}', "\u{1e}>");
        let tag = format!("{{{escaped}}}");
        let slots: BTreeSet<_> = on
            .iter()
            .flatten()
            .filter(|key| {
                let key = key.strip_prefix(prefix).expect("ours");
                key.split('\u{1f}').next() == Some(&tag)
            })
            .map(|key| cluster.slot(key))
            .collect();
        assert_eq!(slots.len(), 1, "{id:?}: {slots:?}");
        for key in keys_of(id) {
            assert_eq!(
                backend.get(&key).unwrap().expect("there").context,
                record.context
            );
        }
    }
    let mut shown = BTreeSet::new();
    backend
        .scan(&mut |key, _| assert!(shown.insert(key.to_owned()), "{key:?} twice"))
        .unwrap();
    let written: BTreeSet<_> = writes.iter().map(|write| write.key().to_owned()).collect();
    assert!(shown == written, "{} of {}", shown.len(), written.len());
}

#[test]
fn a_migrating_slot_is_followed() {
    let cluster = Cluster::start();
    let backend = cluster.backend();
    let mine = record(PARENT);
    let ids = ["a\u{1f}1", "a\u{1f}2", "a\u{1f}3"];
    let slot = cluster.slot("{a}");
    let from = (0..3).find(|n| (SLOTS * n / 3..SLOTS * (n + 1) / 3).contains(&slot));
    let from = from.expect("one node has it");
    let to = (from + 1) % 3;
    backend
        .write_all(&[claim(ids[0], &mine), claim(ids[1], &mine)])
        .unwrap();

    let set = |on: usize, how: &str, id: Option<String>| {
        let mut command = redis::cmd("CLUSTER");
        command.arg("SETSLOT").arg(slot).arg(how).arg(id);
        cluster.ask(on, &command);
    };
    set(to, "IMPORTING", Some(cluster.id(from)));
    set(from, "MIGRATING", Some(cluster.id(to)));
    let move_key = |key: &str| {
        let mut migrate = redis::cmd("MIGRATE");
        migrate.arg("127.0.0.1").arg(cluster.nodes[to].port());
        migrate.arg(format!("workflow-context:{{a}}{}", &key[1..]));
        migrate.arg(0).arg(5_000);
        cluster.ask(from, &migrate);
    };
    move_key(ids[0]);
    // One key has moved, one has not, and a new one is written to the slot's destination.
    for round in 0..2 {
        let winners = backend.write_all(&ids.map(|id| claim(id, &mine))).unwrap();
        let taken: Vec<_> = winners.iter().map(|o| o.existing().is_some()).collect();
        assert_eq!(taken, [true, true, round == 1]);
        for id in ids {
            assert!(backend.get(id).unwrap().is_some(), "{id:?}");
        }
    }
    assert_eq!(cluster.keys(to).len(), 2);
    move_key(ids[1]);
    for number in [to, from, 3 - to - from] {
        set(number, "NODE", Some(cluster.id(to)));
    }
    for backend in [&backend, &cluster.backend()] {
        for id in ids {
            assert!(backend.get(id).unwrap().is_some(), "{id:?}");
        }
        let winners = backend.write_all(&ids.map(|id| claim(id, &mine))).unwrap();
        assert!(winners.iter().all(|o| o.existing().is_some()));
    }
    assert_eq!(cluster.keys(to).len(), 3);
    backend
        .write_all(&ids.map(|id| Write::Remove(id.to_owned())))
        .unwrap();
    assert!(cluster.keys(to).is_empty());
}

#[test]
fn undecodable_values_are_left_alone_on_every_node() {
    let cluster = Cluster::start();
    let backend = cluster.backend();
    let mine = record(PARENT);
    for number in 0..3 {
        let id = cluster.ids_on(number, 1).remove(0);
        let mut set = redis::cmd("SET");
        cluster.ask(
            number,
            set.arg(format!("workflow-context:{{{id}}}")).arg("garbage"),
        );
    }
    let ids: Vec<_> = (0..30).map(|n| format!("order-{n}")).collect();
    let writes: Vec<_> = ids.iter().map(|id| claim(id, &mine)).collect();
    let outcomes = backend.write_all(&writes).unwrap();
    let unreadable = |outcome: &&WriteOutcome| matches!(outcome, WriteOutcome::Unreadable);
    assert_eq!(outcomes.iter().filter(unreadable).count(), 3);
    assert_eq!(backend.malformed(), 3);
    let found = ids.iter().filter_map(|id| backend.get(id).unwrap());
    assert_eq!(found.count(), 27);
    let keys: Vec<_> = (0..3).flat_map(|number| cluster.keys(number)).collect();
    assert_eq!(keys.len(), 30);
}

#[test]
fn one_of_many_concurrent_claims_wins() {
    let cluster = Cluster::start();
    let ids: Vec<_> = (0..300).map(|n| n.to_string()).collect();
    let winners = at_once(4, |thread| {
        let mine = record(&format!(
            "00-0af7651916cd43dd8448eb211c80319c-{:016x}-01",
            thread + 1
        ));
        let writes: Vec<_> = ids.iter().map(|id| claim(id, &mine)).collect();
        let winners = cluster.backend().write_all(&writes).unwrap();
        let spans = winners
            .into_iter()
            .map(|winner| winner.existing().unwrap_or(&mine).context.span_id());
        spans.collect::<Vec<_>>()
    });
    assert!(winners.iter().all(|spans| *spans == winners[0]));
}

#[test]
fn the_documented_permissions_suffice() {
    let cluster = Cluster::start();
    let commands = "set getrange del pexpire pttl ping scan cluster|slots asking";
    for number in 0..3 {
        let mut user = redis::cmd("ACL");
        user.arg("SETUSER")
            .arg("worker")
            .arg("on")
            .arg(">secret")
            .arg("~workflow-context:*");
        for command in commands.split(' ') {
            user.arg(format!("+{command}"));
        }
        cluster.ask(number, &user);
    }
    // The settings of the first URL apply to all of them.
    let first = cluster.nodes[0].url().replace("//", "//worker:secret@");
    let backend = RedisBackend::connect_cluster([&*first]).unwrap();
    let backend = backend.with_response_timeout(PATIENCE);
    assert!(!format!("{backend:?}").contains("secret"));
    let writes: Vec<_> = (0..30)
        .map(|n| claim(&n.to_string(), &record(PARENT)))
        .collect();
    assert!(
        backend
            .write_all(&writes)
            .unwrap()
            .iter()
            .all(|o| o.existing().is_none())
    );
    assert!(
        backend
            .write_all(&writes)
            .unwrap()
            .iter()
            .all(|o| o.existing().is_some())
    );
    backend.flush().unwrap();
    let mut shown = 0;
    backend.scan(&mut |_, _| shown += 1).unwrap();
    assert_eq!(shown, 30);
}

#[test]
fn connecting_needs_no_reachable_cluster() {
    assert!(matches!(
        RedisBackend::connect_cluster([]),
        Err(ConnectError::NoUrl)
    ));
    let wrong = RedisBackend::connect_cluster(["redis://127.0.0.1/", "127.0.0.1"]);
    assert!(matches!(wrong, Err(ConnectError::InvalidUrl { .. })));
    let nobody =
        RedisBackend::connect_cluster(["redis://127.0.0.1:1/", "redis://127.0.0.1:2/"]).unwrap();
    assert!(nobody.get("id").is_err() && nobody.flush().is_err());
    assert!(nobody.write_all(&[claim("id", &record(PARENT))]).is_err());

    // A single server is not a Cluster either.
    let server = RedisServer::start();
    let single = RedisBackend::connect_cluster([&*server.url()]).unwrap();
    let error = single.get("id").unwrap_err();
    assert!(error.to_string().contains("error reply"), "{error}");
}

#[test]
fn some_nodes_may_be_unreachable() {
    let cluster = Cluster::start();
    let urls = ["redis://127.0.0.1:1/".to_owned(), cluster.nodes[2].url()];
    let backend = RedisBackend::connect_cluster(urls.iter().map(String::as_str)).unwrap();
    let backend = backend.with_response_timeout(PATIENCE);
    for id in cluster.ids_on(0, 3) {
        assert!(
            backend
                .write_all(&[claim(&id, &record(PARENT))])
                .unwrap()
                .iter()
                .all(|o| o.existing().is_none())
        );
    }
    assert_eq!(cluster.keys(0).len(), 3);
}

/// Returns a worker with limited timeouts.
fn worker(cluster: &Cluster) -> Worker {
    let timeout = Duration::from_millis(300);
    let backend = cluster.backend();
    let backend = backend
        .with_connect_timeout(timeout)
        .with_response_timeout(timeout);
    let storage = WorkflowContextStorage::builder()
        .backend(backend)
        .lookup_budget(Duration::from_millis(200))
        .build();
    Worker::with_storage(storage.expect("sound settings"))
}

fn step(worker: &Worker, id: &str) {
    worker.run(|| tracing::info_span!("step", workflow.instance_id = %id).in_scope(|| {}));
}

/// Makes one of three nodes unavailable, and available again.
fn with_one_node_unavailable(away: impl FnOnce(&mut Cluster), back: impl FnOnce(&mut Cluster)) {
    let mut cluster = Cluster::start();
    let [one, other] = [(); 2].map(|()| worker(&cluster));
    let lost = cluster.ids_on(0, 40);
    let (before, during) = lost.split_at(20);
    let others: Vec<_> = [1, 2]
        .iter()
        .flat_map(|&n| cluster.ids_on(n, 100))
        .collect();
    for id in before {
        step(&one, id);
    }
    one.storage.flush().unwrap();
    step(&other, &others[0]);
    other.storage.flush().unwrap();

    away(&mut cluster);
    let errors = || one.storage.stats().backend_errors;
    step(&one, &during[0]);
    wait_until("the failure is noticed", || errors() > 0);
    // Spans of its instances still start, and share one trace within this worker.
    let start = Instant::now();
    for id in during {
        step(&one, id);
        let trace = one.stored_trace(id);
        step(&one, id);
        assert_eq!(one.stored_trace(id), trace);
    }
    let took = start.elapsed();
    assert!(one.storage.flush().is_err(), "not all is written");
    // Instances of the other nodes reach the other worker, although writes for the unavailable one are queued.
    step(&other, &during[0]);
    wait_until("the circuit is open there too", || {
        other.storage.stats().backend_errors > 0
    });
    for id in &others[1..] {
        step(&one, id);
    }
    let trace = |worker: &Worker, id: &str| {
        let found = worker.storage.get(id).unwrap();
        found.map(|found| found.trace_id())
    };
    for id in &others[1..] {
        wait_until("what one has recorded is found by the other", || {
            trace(&other, id) == trace(&one, id)
        });
    }
    eprintln!(
        "{} spans of the unavailable node took {took:?}; {:?}",
        2 * during.len(),
        one.storage.stats()
    );
    assert!(took < Duration::from_secs(10), "{took:?}");

    back(&mut cluster);
    for worker in [&one, &other] {
        wait_until("all is written", || worker.storage.flush().is_ok());
    }
    let late = worker(&cluster);
    for id in &during[1..] {
        assert_eq!(trace(&late, id), trace(&one, id), "{id:?}");
    }
    // Both have recorded this one, and agree by now.
    for worker in [&one, &other] {
        assert_eq!(trace(worker, &during[0]), trace(&late, &during[0]));
    }
    for worker in [&one, &other] {
        assert_eq!(worker.storage.stats().dropped_writes, 0);
    }
}

#[test]
fn with_one_of_three_nodes_down_the_others_go_on() {
    with_one_node_unavailable(
        |cluster| cluster.nodes[0].stop(),
        |cluster| cluster.start_again(0),
    );
}

#[test]
fn with_one_of_three_nodes_frozen_the_others_go_on() {
    with_one_node_unavailable(
        |cluster| cluster.nodes[0].freeze(),
        |cluster| cluster.nodes[0].thaw(),
    );
}

#[test]
fn a_replica_takes_over() {
    let mut cluster = Cluster::with_replicas(1, Duration::from_secs(1));
    let backend = cluster.backend();
    let id = cluster.ids_on(0, 1).remove(0);
    let confirmed = cluster.backend().with_replicas(1);
    confirmed.write_all(&[claim(&id, &record(PARENT))]).unwrap();
    assert!(!cluster.keys(3).is_empty(), "the replica has it");
    // The other masters have no replica, and go on all the same.
    let other = cluster.ids_on(1, 1).remove(0);
    let hasty = confirmed.with_response_timeout(Duration::from_secs(2));
    let outcomes = hasty.write(&[claim(&other, &record(PARENT))]).unwrap();
    let [WriteOutcome::Failed(error)] = &outcomes[..] else {
        panic!("{outcomes:?}");
    };
    assert!(
        error.is_partial() && error.to_string().contains("0 of 1"),
        "{error}"
    );
    wait_until("its server is not marked down", || {
        matches!(hasty.get(&other), Ok(Some(_)))
    });
    cluster.nodes[0].stop();
    wait_until("the replica is written to", || {
        backend
            .write_all(&[Write::Put(id.clone(), record(PARENT))])
            .is_ok()
    });
    assert!(backend.get(&id).unwrap().is_some());
    // The old master comes back as a replica of the new one.
    cluster.start_again(0);
    wait_until("it has learned so", || {
        backend.get(&id).is_ok_and(|found| found.is_some())
    });
}

#[test]
fn restarted_masters_are_found_again() {
    let mut cluster = Cluster::start();
    let backend = cluster.backend();
    let writes: Vec<_> = (0..30)
        .map(|n| claim(&n.to_string(), &record(PARENT)))
        .collect();
    backend.write_all(&writes).unwrap();
    for number in 0..3 {
        cluster.start_again(number);
        wait_until("all is written again", || {
            backend.write_all(&writes).is_ok() && backend.flush().is_ok()
        });
        let mut shown = 0;
        backend.scan(&mut |_, _| shown += 1).unwrap();
        assert_eq!(shown, writes.len());
    }
}
