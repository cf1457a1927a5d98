//! The API over TLS, as curl and the command line reach it, with a certificate that is replaced while it serves.

#![allow(clippy::unwrap_used, clippy::expect_used)] // It is all tests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longer than anything in here takes.
const PATIENCE: Duration = Duration::from_secs(60);

struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A certificate for 127.0.0.1 that signs itself.
fn certificate(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (certificate, key) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    command.args(["-days", "2", "-subj", "/CN=pulau", "-addext", "subjectAltName=IP:127.0.0.1"]);
    command.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    let made = command.arg("-out").arg(&certificate).arg("-keyout").arg(&key).output().expect("openssl");
    assert!(made.status.success(), "{made:?}");
    (certificate, key)
}

fn pulau(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pulau"));
    for variable in ["PULAU_SOCKET", "PULAU_URL", "PULAU_TOKEN", "PULAU_CA", "PULAU_DATA_DIR"] {
        command.env_remove(variable);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn serve(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = pulau(&["serve", "--simulate", "--data-dir"]);
    command.arg(dir.join("data")).arg("--socket").arg(dir.join("api.sock")).args(arguments);
    command
}

impl Daemon {
    fn start(dir: TempDir, certificate: &Path, key: &Path) -> Self {
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = serve(dir.path(), &["--listen", "127.0.0.1:0", "--tls-cert"]);
        command.arg(certificate).arg("--tls-key").arg(key).stderr(log);
        Daemon { child: command.spawn().unwrap(), dir }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    #[track_caller]
    fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn hang_up(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    }
}

fn curl(url: &str, ca: &Path) -> Output {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "30", "--cacert"]).arg(ca);
    command.arg(format!("{url}/healthz")).output().expect("curl")
}

#[test]
fn the_api_speaks_tls_and_takes_a_new_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (first, first_key) = certificate(dir.path(), "first");
    let (second, second_key) = certificate(dir.path(), "second");
    let (used, used_key) = (dir.path().join("used.pem"), dir.path().join("used.key"));
    std::fs::copy(&first, &used).unwrap();
    std::fs::copy(&first_key, &used_key).unwrap();
    let daemon = Daemon::start(dir, &used, &used_key);
    let url = daemon.until("its address", || {
        let log = daemon.log();
        let at = log.find("https://")?;
        log[at..].split_whitespace().next().map(str::to_owned)
    });
    let answer = curl(&url, &first);
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "ok\n", "{answer:?}");
    assert_eq!(curl(&url, &second).status.code(), Some(60), "a certificate nobody trusts");
    let plain = Command::new("curl").args(["-s", "--max-time", "30", &url.replace("https", "http")]).output();
    assert!(!plain.unwrap().status.success(), "it does not speak without TLS");

    // The command line, with a token over TLS.
    let socket = daemon.dir.path().join("api.sock").to_string_lossy().into_owned();
    let made =
        pulau(&["token", "create", "t", "--role", "read", "--expires", "1h", "--socket", &socket]).output();
    let token = String::from_utf8(made.unwrap().stdout).unwrap();
    let show = |ca: &Path| {
        let ca = ca.to_string_lossy().into_owned();
        pulau(&["host", "show", "--url", &url, "--ca", &ca, "--token", token.trim()]).output().unwrap()
    };
    let shown = show(&first);
    assert!(shown.status.success(), "{shown:?}");
    let distrusted = show(&second);
    assert!(String::from_utf8_lossy(&distrusted.stderr).contains("--ca"), "{distrusted:?}");

    // Files that do not go together change nothing; ones that do count at once.
    std::fs::copy(&second, &used).unwrap();
    daemon.hang_up();
    daemon.until("it says so", || daemon.log().contains("stays the one before").then_some(()));
    assert!(curl(&url, &first).status.success());
    std::fs::copy(&second_key, &used_key).unwrap();
    daemon.hang_up();
    daemon.until("the new certificate", || curl(&url, &second).status.success().then_some(()));
    assert_eq!(curl(&url, &first).status.code(), Some(60));
    // Without being told, too.
    std::fs::copy(&first, &used).unwrap();
    std::fs::copy(&first_key, &used_key).unwrap();
    daemon.until("the first one again", || curl(&url, &first).status.success().then_some(()));
    assert!(show(&first).status.success());
}

#[test]
fn tokens_are_not_sent_over_a_network_in_the_clear() {
    let dir = tempfile::tempdir().unwrap();
    let refused = serve(dir.path(), &["--listen", "0.0.0.0:0"]).output().unwrap();
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("--tls-cert"), "{message}");
    let half = serve(dir.path(), &["--listen", "127.0.0.1:0", "--tls-cert", "x.pem"]).output().unwrap();
    assert_eq!(half.status.code(), Some(2), "{half:?}");
    let (certificate, _) = certificate(dir.path(), "one");
    let certificate = certificate.to_string_lossy().into_owned();
    let options = ["--listen", "127.0.0.1:0", "--tls-cert", &certificate, "--tls-key", &certificate];
    let wrong = serve(dir.path(), &options).output().unwrap();
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("cannot read a private key"), "{wrong:?}");
}
