use super::*;

fn run(arguments: &str) -> Options {
    match parse(arguments.split_whitespace().map(OsString::from)) {
        Ok(Command::Run(options)) => *options,
        other => panic!("{arguments}: {other:?}"),
    }
}

fn error(arguments: &str) -> String {
    parse(arguments.split_whitespace().map(OsString::from)).unwrap_err().to_string()
}

#[test]
fn nothing_given_is_firecrackers_default() {
    let options = run("");
    assert_eq!(options.id, "anonymous-instance");
    assert_eq!(options.api_socket, Some(DEFAULT_API_SOCKET.into()));
    assert_eq!((options.payload_limit, options.mmds_limit), (51_200, 51_200));
    assert!(options.seccomp && !options.boot_timer);
    assert_eq!((options.logger, options.jail, options.config_file), (None, None, None));
}

#[test]
fn every_option_is_read() {
    let options = run("--api-sock /a --id vm-1 --config-file=/c --metadata /m --log-path /l --level debug \
        --show-level --show-log-origin --module pulau --metrics-path /x --boot-timer --no-seccomp \
        --http-api-max-payload-size 10 --mmds-size-limit 20 --start-time-us 1 --start-time-cpu-us 2 --enable-pci \
        --parent-cpu-time-us 3");
    let expected = Options {
        id: "vm-1".into(),
        api_socket: Some("/a".into()),
        config_file: Some("/c".into()),
        metadata: Some("/m".into()),
        logger: Some(LoggerConfig {
            log_path: Some("/l".into()),
            level: Some(LogLevel::Debug),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: Some("pulau".into()),
        }),
        metrics_path: Some("/x".into()),
        boot_timer: true,
        seccomp: false,
        pci_asked_for: true,
        payload_limit: 10,
        mmds_limit: 20,
        start_time_us: Some(1),
        start_time_cpu_us: Some(2),
        parent_cpu_time_us: Some(3),
        jail: None,
        pid_file: None,
        exit_file: None,
    };
    assert_eq!(options, expected);
    assert_eq!(run("--http-api-max-payload-size 10").mmds_limit, 10);
    assert_eq!(run("--no-api --config-file c").api_socket, None);
}

#[test]
fn a_jail_is_read() {
    let options = run("--jail /j --uid 5 --gid 6 --cgroup /sys/fs/cgroup/a --cgroup-limit memory.max=1M \
        --cgroup-limit pids.max=5 --resource-limit no-file=64 --netns /run/netns/a --pid-file /p \
        --exit-file /e --tap a --tap b");
    let expected = JailConfig {
        cgroup: Some(Cgroup {
            path: "/sys/fs/cgroup/a".into(),
            limits: vec!["memory.max=1M".parse().unwrap(), "pids.max=5".parse().unwrap()],
        }),
        network: Network::Namespace("/run/netns/a".into()),
        taps: vec!["a".into(), "b".into()],
        resource_limits: vec!["no-file=64".parse().unwrap()],
        pid_file: Some("/p".into()),
        exit_file: Some("/e".into()),
        ..JailConfig::new("/j", 5, 6)
    };
    assert_eq!(options.jail, Some(expected));
    assert_eq!((options.pid_file, options.exit_file), (None, None));
    let options = run("--pid-file /p --exit-file /e");
    assert_eq!((options.pid_file, options.exit_file), (Some("/p".into()), Some("/e".into())));
    assert_eq!(run("--jail /j --uid 5 --gid 6").jail, Some(JailConfig::new("/j", 5, 6)));
    let new = run("--jail /j --uid 5 --gid 6 --new-net-ns").jail.unwrap();
    assert_eq!(new.network, Network::New);
    for (arguments, message) in [
        ("--uid 5", "--uid needs --jail"),
        ("--tap a", "--tap needs --jail"),
        ("--cgroup-limit memory.max=1", "--cgroup-limit needs --jail"),
        ("--jail /j --uid 5", "--jail needs --uid and --gid"),
        ("--jail /j --uid 5 --gid 6 --cgroup-limit memory.max=1", "--cgroup-limit needs --cgroup"),
        ("--jail /j --uid 5 --gid 6 --new-net-ns --netns /n", "--new-net-ns: --netns names one already"),
    ] {
        assert_eq!(error(arguments), message);
    }
    assert!(error("--jail /j --uid 5 --gid 6 --resource-limit x").contains("resource limit"));
    assert!(error("--jail /j --uid -5 --gid 6").starts_with("--uid: \"-5\": invalid digit"));
}

#[test]
fn what_is_wrong_is_named() {
    for (arguments, message) in [
        ("--nonsense", "invalid option '--nonsense'"),
        ("file", "unexpected argument \"file\""),
        ("-x", "invalid option '-x'"),
        ("--api-sock", "missing argument for option '--api-sock'"),
        ("--api-sock a --api-sock b", "--api-sock was given more than once"),
        ("--boot-timer --boot-timer", "--boot-timer was given more than once"),
        ("--no-api", "--no-api needs --config-file"),
        ("--no-api --config-file c --api-sock a", "--no-api: there is no --api-sock then"),
        ("--id a_b", "--id: id: \"a_b\" must be 1 to 64 letters, digits and hyphens"),
        ("--start-time-us x", "--start-time-us: \"x\": invalid digit found in string"),
        ("--mmds-size-limit -1", "--mmds-size-limit: \"-1\": invalid digit found in string"),
        ("--describe-snapshot x", "--describe-snapshot is not supported"),
    ] {
        assert_eq!(error(arguments), message);
    }
    let level = parse(["--level", "loud"].map(OsString::from)).unwrap_err();
    assert!(level.is_configuration());
    assert!(level.to_string().starts_with("--level: \"loud\": \"loud\" is not a log level"));
}

#[test]
fn help_and_version_come_first() {
    for arguments in ["--help", "-h", "--id vm --help --nonsense"] {
        assert_eq!(parse(arguments.split(' ').map(OsString::from)).unwrap(), Command::Help);
    }
    assert_eq!(parse(["-V".into()]).unwrap(), Command::Version);
}

#[test]
fn help_tells_of_every_option() {
    let source = include_str!("cli.rs");
    let all: Vec<&str> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.split_once("\" => ").map(|(name, _)| name))
        .collect();
    assert!(all.len() > 25);
    let unsupported = ["seccomp-filter", "snapshot-version", "describe-snapshot"];
    for name in all {
        let told = HELP.contains(&format!("--{name}"));
        assert_eq!(told, !unsupported.contains(&name), "{name}");
    }
}
