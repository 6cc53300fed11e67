//! Tests that run in a process of their own: the test binary starts itself again with one test selected.

use std::process::Command;

/// Returns a command that runs one test of this binary alone in a new process, even if the test is ignored.
///
/// The test is named by the path of its module, as `module_path!()` gives it, and its function.
pub(crate) fn test_process(module_path: &str, test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the path of this binary"));
    // libtest leaves the name of the binary's root module out.
    let name = match module_path.split_once("::") {
        Some((_, module)) => format!("{module}::{test}"),
        None => test.to_owned(),
    };
    command.args([&name, "--exact", "--include-ignored", "--nocapture"]);
    command
}

/// Runs the body of a test in a new process, because it looks at state that other tests of the binary would change.
pub(crate) fn in_own_process(module_path: &str, test: &str, body: impl FnOnce()) {
    const IN_OWN_PROCESS: &str = "TEST_IN_OWN_PROCESS";
    if std::env::var_os(IN_OWN_PROCESS).is_some() {
        return body();
    }
    let mut process = test_process(module_path, test);
    let output = process.env(IN_OWN_PROCESS, "1").output();
    let output = output.expect("this binary can be run");
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text"));
    print!("{stdout}");
    eprint!("{stderr}");
    assert!(
        output.status.success(),
        "{test} failed in a process of its own"
    );
    assert!(stdout.contains("1 passed"), "{test} was not found");
}
