//! PostgreSQL servers for one test, and PgBouncer before them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use super::{Directory, PATIENCE, Server, free_port};

/// The superuser of the servers, and the user of the system as whom they run if the tests run as root.
const USER: &str = "postgres";

/// A new server on this machine with data of its own, which is stopped when this is dropped.
#[derive(Debug)]
pub(crate) struct PostgresServer {
    process: Child,
    port: u16,
    directory: Directory,
    settings: Vec<String>,
    room: Room,
}

/// The room on the disk that a server has.
#[derive(Clone, Copy, Debug)]
enum Room {
    Any,
    /// No file may exceed that many bytes.
    Files(u64),
    /// The directory of `small_disk` is a file system of its own of so many bytes, which nobody but the server sees.
    SmallDisk(u64),
}

impl PostgresServer {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with these settings, each as in `name=value`.
    pub(crate) fn start_with(settings: &[&str]) -> Self {
        Self::start_on(settings, |_| {})
    }

    /// Starts a server none of whose files may exceed that many bytes.
    pub(crate) fn start_with_files_of(bytes: u64) -> Self {
        Self::start_in(new_data(), &["autovacuum=off"], Room::Files(bytes))
    }

    /// Starts a server with a tablespace of its own for new tables, on a disk of so many bytes: a tmpfs in a mount namespace
    /// of the server. That needs root with `CAP_SYS_ADMIN`, or else unprivileged user namespaces. Where it cannot be
    /// mounted, as in most containers, the limit holds for each file of the server instead, which is told.
    pub(crate) fn start_on_a_small_disk(bytes: u64) -> Self {
        let settings = ["autovacuum=off"];
        let directory = new_data();
        let disk = directory.file("small disk");
        std::fs::create_dir(&disk).expect("a directory");
        own(directory.path());
        let mut can_mount = on_small_disk(&disk, bytes, &Command::new("true"));
        match can_mount.output() {
            Ok(output) if output.status.success() => {
                let server = Self::start_in(directory, &settings, Room::SmallDisk(bytes));
                let disk = disk.display();
                server.sql(&format!("CREATE TABLESPACE small LOCATION '{disk}'"));
                server.sql("ALTER DATABASE postgres SET default_tablespace = small");
                server
            }
            other => {
                eprintln!(
                    "no small disk, so a limit on the size of files stands for it: it cannot be mounted, run as root \
                     with CAP_SYS_ADMIN, or allow user namespaces: {other:?}"
                );
                Self::start_in(directory, &settings, Room::Files(bytes))
            }
        }
    }

    /// Starts a standby of another server, which takes no writes until it is promoted.
    pub(crate) fn start_standby_of(primary: &Self, settings: &[&str]) -> Self {
        let directory = Directory::new();
        own(directory.path());
        let mut command = as_user(&program("pg_basebackup"));
        command
            .arg("--pgdata")
            .arg(directory.file("data"))
            .args(["--dbname", &primary.url()])
            .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]);
        run(&mut command);
        Self::start_in(directory, settings, Room::Any)
    }

    /// Starts a server after its data directory was changed.
    pub(crate) fn start_on(settings: &[&str], change: impl FnOnce(&Path)) -> Self {
        let directory = new_data();
        change(&directory.file("data"));
        own(directory.path());
        Self::start_in(directory, settings, Room::Any)
    }

    fn start_in(directory: Directory, settings: &[&str], room: Room) -> Self {
        let settings: Vec<_> = settings.iter().map(ToString::to_string).collect();
        // Another process may take the port between its choice and its use.
        let (port, process) = (0..10)
            .find_map(|_| {
                let port = free_port();
                Some((port, try_start(&directory, port, &settings, room)?))
            })
            .expect("postgres starts on one of ten free ports");
        Self {
            process,
            port,
            directory,
            settings,
            room,
        }
    }

    /// Ends all processes of the server, as a crash would.
    pub(crate) fn stop(&mut self) {
        signal("-QUIT", &[self.process.id().to_string()]);
        let _ = self.process.wait();
    }

    /// Restarts the server with its data.
    pub(crate) fn start_again(&mut self) {
        self.stop();
        let deadline = Instant::now() + PATIENCE;
        self.process = loop {
            match self.try_start() {
                Some(process) => break process,
                None => assert!(Instant::now() < deadline, "postgres starts again"),
            }
        };
    }

    fn try_start(&self) -> Option<Child> {
        try_start(&self.directory, self.port, &self.settings, self.room)
    }

    /// Restarts the server with new, empty data.
    pub(crate) fn start_again_empty(&mut self) {
        self.stop();
        self.directory = new_data();
        self.start_again();
    }

    /// Stops the server's processes until it is thawed, those of its connections included.
    pub(crate) fn freeze(&self) {
        let server = self.process.id().to_string();
        signal("-STOP", std::slice::from_ref(&server));
        signal("-STOP", &children(&server));
    }

    pub(crate) fn thaw(&self) {
        let server = self.process.id().to_string();
        signal("-CONT", &children(&server));
        signal("-CONT", &[server]);
    }

    /// Runs SQL as the superuser, and returns its rows, the columns separated by `|`.
    #[track_caller]
    pub(crate) fn sql(&self, sql: &str) -> String {
        let rows = self.try_sql(sql);
        rows.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// Runs SQL as the superuser. Returns its rows, or the error that the server answers.
    pub(crate) fn try_sql(&self, sql: &str) -> Result<String, String> {
        psql(&self.url(), sql)
    }

    /// Runs SQL in a transaction that lasts until the result is dropped.
    pub(crate) fn transaction(&self, sql: &str) -> Transaction {
        let mut process = Command::new(program("psql"))
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &self.url()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("psql can be run");
        let stdin = process.stdin.as_mut().expect("piped");
        writeln!(stdin, "BEGIN; {sql}; \\echo begun").expect("psql reads it");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let begun = lines.map_while(Result::ok).any(|line| line == "begun");
        assert!(begun, "{sql}: psql failed");
        Transaction(process)
    }
}

impl Server for PostgresServer {
    fn port(&self) -> u16 {
        self.port
    }

    fn url_at(&self, port: u16) -> String {
        postgres_url(USER, port)
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A transaction that ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Transaction(Child);

impl Drop for Transaction {
    fn drop(&mut self) {
        // psql ends with its input.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// How a worker reaches a server.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    Direct,
    /// The same, with the setting that makes use of it.
    OwnSessions,
    /// Through PgBouncer, in a transaction at a time.
    Pooled,
}

impl Way {
    pub(crate) fn to(self, server: &PostgresServer) -> Route {
        self.to_port(server.port(), &[])
    }

    /// Returns the way to what listens at a port of this machine, for the superuser and these users with their passwords.
    pub(crate) fn to_port(self, port: u16, users: &[(&str, &str)]) -> Route {
        let pooler = match self {
            Self::Direct | Self::OwnSessions => None,
            Self::Pooled => Some(PgBouncer::before_port(port, users)),
        };
        Route {
            port,
            pooler,
            owns_sessions: matches!(self, Self::OwnSessions),
        }
    }
}

/// A way to one server.
#[derive(Debug)]
pub(crate) struct Route {
    port: u16,
    pub(crate) pooler: Option<PgBouncer>,
    pub(crate) owns_sessions: bool,
}

impl Server for Route {
    fn port(&self) -> u16 {
        self.pooler.as_ref().map_or(self.port, Server::port)
    }

    fn url_at(&self, port: u16) -> String {
        postgres_url(USER, port)
    }
}

/// PgBouncer in transaction mode before a server, which is stopped when this is dropped.
#[derive(Debug)]
pub(crate) struct PgBouncer {
    process: Child,
    port: u16,
    users: String,
    directory: Directory,
}

impl PgBouncer {
    /// Starts it with three connections to the server.
    pub(crate) fn before(server: &PostgresServer) -> Self {
        Self::before_port(server.port(), &[])
    }

    /// Starts it with three connections to the server at a port of this machine. These users, each with a password, have to
    /// tell it; the superuser has none.
    pub(crate) fn before_port(server: u16, users: &[(&str, &str)]) -> Self {
        let user = |(name, password): &(&str, &str)| format!("\"{name}\" \"{password}\"\n");
        let users: String = [(USER, "")].iter().chain(users).map(user).collect();
        (0..10)
            .find_map(|_| Self::try_before(server, &users))
            .expect("pgbouncer starts on one of ten free ports")
    }

    fn try_before(server: u16, users: &str) -> Option<Self> {
        let (directory, port) = (Directory::new(), free_port());
        write_settings(&directory, port, server, users);
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"];
        let program = program.into_iter().find(|path| Path::new(path).exists());
        let mut process = as_user(Path::new(program.unwrap_or("pgbouncer")))
            .arg(directory.file("pgbouncer.ini"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("pgbouncer cannot be run: {error}; install the package pgbouncer")
            });
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Ok(Some(_)) = process.try_wait() {
                return None;
            }
            assert!(Instant::now() < deadline, "pgbouncer listens");
            thread::sleep(Duration::from_millis(5));
        }
        Some(Self {
            process,
            port,
            users: users.to_owned(),
            directory,
        })
    }

    /// Replaces its connections by some to another server.
    pub(crate) fn lead_to(&self, server: &PostgresServer) {
        write_settings(&self.directory, self.port, server.port(), &self.users);
        self.read_settings();
    }

    /// Has it accept connections with this parameter, and ignore that, as it refuses them by default.
    pub(crate) fn ignore(&self, parameter: &str) {
        let file = self.directory.file("pgbouncer.ini");
        let settings = std::fs::read_to_string(&file).expect("its settings");
        let more = format!("{settings}ignore_startup_parameters = {parameter}\n");
        std::fs::write(&file, more).expect("a file");
        self.read_settings();
    }

    fn read_settings(&self) {
        signal("-HUP", &[self.process.id().to_string()]);
    }

    /// Runs SQL on one of its connections to the server.
    #[track_caller]
    pub(crate) fn sql(&self, sql: &str) -> String {
        psql(&self.url(), sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }
}

impl Server for PgBouncer {
    fn port(&self) -> u16 {
        self.port
    }

    fn url_at(&self, port: u16) -> String {
        postgres_url(USER, port)
    }
}

fn write_settings(directory: &Directory, port: u16, server: u16, users: &str) {
    let file = directory.file("users");
    std::fs::write(&file, users).expect("a file");
    let auth_type = match users.lines().count() {
        1 => "trust",
        _ => "scram-sha-256",
    };
    // By default, it waits for 15 seconds after it could not connect.
    let settings = format!(
        "[databases]\n* = host=127.0.0.1 port={server}\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         auth_type = {auth_type}\nauth_file = {}\npool_mode = transaction\nserver_login_retry = 1\n\
         default_pool_size = 3\nmax_client_conn = 200\n",
        file.display()
    );
    std::fs::write(directory.file("pgbouncer.ini"), settings).expect("a file");
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns the URL for a user, with the password behind a colon, of what listens at a port of this machine.
pub(crate) fn postgres_url(user: &str, port: u16) -> String {
    format!("postgres://{user}@127.0.0.1:{port}/postgres")
}

fn psql(url: &str, sql: &str) -> Result<String, String> {
    let output = Command::new(program("psql"))
        .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql])
        .output()
        .expect("psql can be run");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let rows = String::from_utf8(output.stdout).expect("text");
    Ok(rows.trim_end().to_owned())
}

fn try_start(directory: &Directory, port: u16, settings: &[String], room: Room) -> Option<Child> {
    let data = directory.file("data");
    let mut command = match room {
        Room::Any => as_user(&program("postgres")),
        Room::Files(bytes) => {
            let mut command = as_user(Path::new("prlimit"));
            command.arg(format!("--fsize={bytes}"));
            command.arg(program("postgres"));
            command
        }
        Room::SmallDisk(bytes) => {
            let disk = directory.file("small disk");
            on_small_disk(&disk, bytes, &as_user(&program("postgres")))
        }
    };
    command
        .arg("-D")
        .arg(&data)
        .args(["-h", "127.0.0.1", "-p", &port.to_string()])
        // Nothing has to survive a crash of this machine.
        .args(["-c", "fsync=off", "-c", "full_page_writes=off"])
        .args([
            "-c",
            "unix_socket_directories=",
            "-c",
            "shared_buffers=32MB",
        ]);
    for setting in settings {
        command.args(["-c", setting]);
    }
    let mut process = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("postgres can be run");
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(Some(_)) = process.try_wait() {
            return None;
        }
        if Instant::now() > deadline {
            let _ = (process.kill(), process.wait());
            panic!("postgres does not become ready");
        }
        // Its eighth line is the state; the first one tells that the file is not of an earlier start.
        let state = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        let is_of_this = state.lines().next() == Some(&process.id().to_string());
        if is_of_this
            && state
                .lines()
                .nth(7)
                .is_some_and(|state| state.trim() == "ready")
        {
            return Some(process);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Returns a directory with the data of a new server.
fn new_data() -> Directory {
    let directory = Directory::new();
    copy(template(), &directory.file("data"));
    own(directory.path());
    directory
}

/// Returns the data of a new server, which take a second to make, and so are kept for later runs.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let version = run(Command::new(program("postgres")).arg("--version"));
        let number = version
            .rsplit(' ')
            .find(|word| word.starts_with(char::is_numeric));
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let template = target.join(format!("small-postgres-{}", number.unwrap_or("any").trim()));
        if template.exists() {
            return template;
        }
        let directory = Directory::new();
        own(directory.path());
        let mut command = as_user(&program("initdb"));
        command
            .arg("-D")
            .arg(directory.file("data"))
            .args(["-U", USER, "--auth=trust", "--no-sync"])
            .args(["--encoding=UTF8", "--locale=C", "--wal-segsize=1"]);
        run(&mut command);
        // No test creates databases. What they would be made from is two thirds of the files, to be copied for each server.
        let sql = directory.file("sql");
        let statements = "UPDATE pg_database SET datistemplate = false\n\
            DROP DATABASE template0\nDROP DATABASE template1\n";
        std::fs::write(&sql, statements).expect("a file");
        let mut command = as_user(&program("postgres"));
        command.args(["--single", "-D"]).arg(directory.file("data"));
        command
            .arg(USER)
            .stdin(std::fs::File::open(&sql).expect("a file"));
        run(&mut command);
        let unfinished = target.join(format!("postgres-{}", std::process::id()));
        copy(&directory.file("data"), &unfinished);
        // Another process may have made it meanwhile.
        if std::fs::rename(&unfinished, &template).is_err() {
            let _ = std::fs::remove_dir_all(&unfinished);
        }
        template
    })
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-R").arg(from).arg(to));
}

/// Gives a directory to the user as whom the servers run.
fn own(directory: &Path) {
    if is_root() {
        run(Command::new("chown").args(["-R", USER]).arg(directory));
    }
}

/// Returns a command that runs as a user who is not root, as whom PostgreSQL and PgBouncer refuse to run.
fn as_user(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--"]);
    command.arg(program);
    command
}

/// Returns a command that runs another one in a mount namespace of its own, in which a directory is a file system of so
/// many bytes.
fn on_small_disk(directory: &Path, bytes: u64, command: &Command) -> Command {
    let mut there = Command::new("unshare");
    let (own, as_user) = match is_root() {
        true => (format!("chown {USER} \"$0\""), String::new()),
        false => {
            there.args(["--user", "--map-root-user"]);
            // Only root may mount, as whom PostgreSQL refuses to run: so in a namespace in that one, as the user again.
            let [user, group] = ["-u", "-g"].map(|of| run(Command::new("id").arg(of)));
            let [user, group] = [user.trim(), group.trim()];
            let back = format!("unshare --user --map-user={user} --map-group={group} --");
            ("true".to_owned(), back)
        }
    };
    let script =
        format!("mount -t tmpfs -o size={bytes} tmpfs \"$0\" && {own} && exec {as_user} \"$@\"");
    there
        .args(["--mount", "sh", "-c", &script])
        .arg(directory)
        .arg(command.get_program())
        .args(command.get_args());
    there
}

fn is_root() -> bool {
    static IS_ROOT: OnceLock<bool> = OnceLock::new();
    *IS_ROOT.get_or_init(|| run(Command::new("id").arg("-u")).trim() == "0")
}

/// Returns the path of a program of PostgreSQL: Debian keeps them out of the `PATH`, one directory for each version.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = versions
        .flatten()
        .map(|version| version.path())
        .max_by_key(number);
    let path = newest.map(|version| version.join("bin").join(name));
    path.filter(|path| path.exists())
        .unwrap_or_else(|| name.into())
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?} cannot be run: {error}; scripts/setup installs what is needed")
    });
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

fn children(process: &str) -> Vec<String> {
    let children = run(Command::new("pgrep").args(["-P", process]));
    children.lines().map(str::to_owned).collect()
}

fn signal(signal: &str, processes: &[String]) {
    // One of them may have ended meanwhile.
    let status = Command::new("kill")
        .arg(signal)
        .args(processes)
        .stderr(Stdio::null())
        .status();
    status.expect("kill(1) can be run");
}
