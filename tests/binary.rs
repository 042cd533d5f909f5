//! Runs the real program and keeps what it said.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

/// What a run of the program left behind.
#[derive(Debug)]
pub struct Run {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Run {
    /// Standard output as JSON, one value a line.
    pub fn json(&self) -> Vec<Value> {
        let lines = self.out.lines();
        lines.map(|line| serde_json::from_str(line).expect("every line is JSON")).collect()
    }

    /// Asserts that it failed with this status, said this on standard error and nothing else.
    pub fn refused(&self, status: i32, text: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.err.contains(text), "{text} is not in {}", self.err);
        assert_eq!(self.out, "", "nothing is half made");
    }
}

/// The program in an environment of its own: no settings, no colour, an empty home and hub, and
/// a new data folder.
pub fn command(arguments: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strand"));
    let home = scratch("home");
    command
        .args(arguments)
        .env_clear()
        .env("HOME", &home)
        .env("XDG_DATA_HOME", new_data_home())
        .env("HF_HOME", home.join("hub"))
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A store has one owner at a time, and tests run side by side.
fn new_data_home() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    scratch("data").join(format!("{}-{number}", process::id()))
}

/// Runs with arguments alone.
pub fn strand(arguments: &[impl AsRef<OsStr>]) -> Run {
    finish(command(arguments), b"")
}

/// Runs with this on standard input.
pub fn piped(arguments: &[impl AsRef<OsStr>], input: impl AsRef<[u8]>) -> Run {
    finish(command(arguments), input.as_ref())
}

/// Starts the command, feeds it and waits for its end.
pub fn finish(mut command: Command, input: &[u8]) -> Run {
    let mut child = command.stdin(Stdio::piped()).spawn().expect("the program starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    // a program that has refused its arguments does not read
    drop(stdin.write_all(input));
    drop(stdin);
    let output = child.wait_with_output().expect("the program ends");
    Run {
        status: output.status.code().expect("it was not killed"),
        out: String::from_utf8(output.stdout).expect("it prints UTF-8"),
        err: String::from_utf8(output.stderr).expect("it prints UTF-8"),
    }
}

/// A folder for this test run, by name; made, never emptied.
pub fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli").join(name);
    fs::create_dir_all(&folder).expect("the folder for tests can be written");
    folder
}

/// A copy of the bundled model's folder that a test may damage.
pub fn copy_of_demo(name: &str) -> PathBuf {
    let folder = scratch(name);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for entry in fs::read_dir(demo).expect("the bundled model is there") {
        let path = entry.expect("it can be listed").path();
        if path.is_file() {
            let copy = folder.join(path.file_name().expect("a file has a name"));
            // written anew: the original may be read-only, and so would its copy be
            fs::write(&copy, fs::read(&path).expect("it can be read")).expect("it can be copied");
        }
    }
    folder
}
