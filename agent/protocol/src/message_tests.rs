use serde::de::DeserializeOwned;

use super::*;

fn same<T: Serialize + DeserializeOwned + PartialEq + fmt::Debug>(value: &T, json: &str) {
    assert_eq!(serde_json::to_string(value).unwrap(), json);
    assert_eq!(&serde_json::from_str::<T>(json).unwrap(), value);
}

#[test]
fn requests_have_their_documented_form() {
    same(&Request::Health, r#"{"type":"health"}"#);
    same(&Request::SetTime(WallClock { secs: 7, nanos: 9 }), r#"{"type":"set_time","secs":7,"nanos":9}"#);
    let shutdown = Shutdown { action: ShutdownAction::PowerOff, grace_ms: None };
    same(&Request::Shutdown(shutdown), r#"{"type":"shutdown","action":"power_off"}"#);
    same(
        &Request::Resumed(Resumed {
            identity: Identity { id: "i-1".into(), hostname: Some("web-1".into()) },
            network: vec!["10.0.0.2/24".parse().unwrap()],
            wall_clock: WallClock { secs: 1, nanos: 0 },
            entropy_seed: EntropySeed::new(vec![0xa5; 32]).unwrap(),
        }),
        &format!(
            r#"{{"type":"resumed","identity":{{"id":"i-1","hostname":"web-1"}},"network":[{{"device":"eth0","addresses":["10.0.0.2/24"]}}],"wall_clock":{{"secs":1,"nanos":0}},"entropy_seed":"{}"}}"#,
            "a5".repeat(32)
        ),
    );
}

#[test]
fn only_argv_is_needed_for_an_exec_and_unknown_fields_are_passed_over() {
    let request: Request = serde_json::from_str(r#"{"type":"exec","argv":["true"],"colour":"red"}"#).unwrap();
    assert_eq!(request, Request::Exec(ExecRequest { argv: vec!["true".into()], ..Default::default() }));
    let error = serde_json::from_str::<Request>(r#"{"type":"fly"}"#).unwrap_err().to_string();
    assert!(error.contains("unknown variant `fly`"), "{error}");
}

#[test]
fn events_and_controls_have_their_documented_form() {
    same(&ExecEvent::Exited { status: ExitStatus::Code(3) }, r#"{"type":"exited","status":{"code":3}}"#);
    same(&ExecEvent::Exited { status: ExitStatus::Signal(9) }, r#"{"type":"exited","status":{"signal":9}}"#);
    same(&ExecEvent::StdinClosed, r#"{"type":"stdin_closed"}"#);
    same(&ExecControl::Signal { signal: 15 }, r#"{"type":"signal","signal":15}"#);
    same(
        &ExecControl::WindowSize(WindowSize { rows: 50, cols: 132 }),
        r#"{"type":"window_size","rows":50,"cols":132}"#,
    );
}

#[test]
fn an_unknown_error_code_reads_as_failed() {
    let error: ErrorReply = serde_json::from_str(r#"{"code":"on_fire","message":"hot"}"#).unwrap();
    assert_eq!(error, ErrorReply::new(ErrorCode::Failed, "hot"));
    same(&ErrorReply::new(ErrorCode::NoSpace, "x"), r#"{"code":"no_space","message":"x"}"#);
}

#[test]
fn seeds_of_a_wrong_size_or_alphabet_are_refused_and_never_printed() {
    let parse = |text: &str| serde_json::from_str::<EntropySeed>(&format!("{text:?}"));
    assert_eq!(parse(&"0f".repeat(512)).unwrap().bytes(), [15; 512]);
    for bad in ["", &"00".repeat(31), &"00".repeat(513), &"0".repeat(65), &"zz".repeat(32)] {
        parse(bad).unwrap_err();
    }
    let seed = parse(&"ab".repeat(32)).unwrap();
    assert_eq!(format!("{seed:?}"), "EntropySeed(32 bytes)");
}
