//! `pulau doctor` as a user or a script calls it. What a host lacks differs; the report's form does not.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]
use std::process::{Command, Output};

fn pulau(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pulau")).args(args).env_remove("PULAU_DATA_DIR").output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_exit_code_and_the_report_agree() {
    let output = pulau(&["doctor", "--json"]);
    let report = json(&output);
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 10);
    for check in checks {
        let fine = check["state"] == "ok";
        assert_eq!(
            check["remedy"].is_null(),
            fine,
            "a remedy exactly where something is to be done: {check}"
        );
        assert!(!check["detail"].as_str().unwrap().is_empty(), "{check}");
    }
    let missing = checks.iter().any(|check| check["state"] == "missing");
    assert_eq!(report["ok"], !missing);
    assert_eq!(output.status.code(), Some(i32::from(missing)));
}

#[test]
fn the_probe_answers_whatever_kvm_does() {
    let output = pulau(&["doctor", "--run-kvm-probe"]);
    let answer = json(&output);
    let showed = answer["Ok"]["loops_per_second"].as_f64().is_some_and(|speed| speed > 0.0);
    let failed = answer["Err"].as_str().is_some_and(|message| !message.is_empty());
    assert!(showed || failed, "{answer}");
}

#[test]
fn quiet_answers_by_exit_code_alone() {
    let loud = pulau(&["doctor", "--check", "kvm,disk", "--json"]);
    assert_eq!(json(&loud)["checks"].as_array().unwrap().len(), 4);
    let quiet = pulau(&["doctor", "--check", "kvm,disk", "--quiet"]);
    assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty());
    assert_eq!(quiet.status.code(), loud.status.code());
}

#[test]
fn an_unknown_check_is_named_with_those_there_are() {
    let output = pulau(&["doctor", "--check", "tpm"]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("no check named `tpm`") && message.contains("kvm-real"), "{message}");
}

#[test]
fn completion_is_a_script_that_knows_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = pulau(&["completion", shell]);
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("doctor"), "{shell}");
    }
}
