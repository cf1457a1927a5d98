use super::*;

group! {
    /// For tests.
    struct TestMetrics {
        reads: Counter,
        level: Gauge,
    }
}

/// One test, because metrics are of the process.
#[test]
fn lines_tell_increases_levels_and_sums() {
    let (a, b) = (Arc::new(TestMetrics::new()), Arc::new(TestMetrics::new()));
    register("test", Some("a"), Arc::new(TestMetrics::new()));
    register("test", Some("a"), a.clone());
    register("test", Some("b"), b.clone());
    flush().unwrap();
    assert!(flush_if_due().is_none());

    let dir = tempfile::tempdir().unwrap();
    let bad = MetricsConfig { metrics_path: dir.path().join("no/such"), ..Default::default() };
    let error = configure(&bad, "i").unwrap_err().to_string();
    assert!(error.starts_with("metrics: metrics_path \"") && error.contains("No such file"), "{error}");

    let config = MetricsConfig {
        metrics_path: dir.path().join("metrics"),
        emit_id: true,
        properties: Some([("zone".to_owned(), "a\"b".to_owned())].into()),
    };
    configure(&config, "vm-1").unwrap();
    assert!(matches!(configure(&config, "vm-1"), Err(MetricsError::AlreadyConfigured)));
    assert!(flush_if_due().unwrap() > Duration::from_secs(50));

    a.reads.inc();
    a.reads.add(4);
    b.reads.inc();
    b.level.set(7);
    flush().unwrap();
    a.reads.inc();
    let totals: serde_json::Value = serde_json::from_str(&totals()).unwrap();
    assert_eq!([&totals["test_a"]["reads"], &totals["test"]["reads"], &totals["test"]["level"]], [6, 7, 7]);
    flush().unwrap();
    let text = std::fs::read_to_string(&config.metrics_path).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, [a, b, sum]) in lines.iter().zip([[5, 1, 6], [1, 0, 1]]) {
        assert_eq!(line["id"], "vm-1");
        assert_eq!(line["properties"]["zone"], "a\"b");
        assert!(line["utc_timestamp_ms"].as_u64().unwrap() > 1_700_000_000_000);
        assert_eq!(line["test_a"]["reads"], a);
        assert_eq!(line["test_b"]["reads"], b);
        assert_eq!(line["test"]["reads"], sum);
        assert_eq!(line["test"]["level"], 7);
        assert!(line["put_api_requests"]["actions_count"].is_u64());
    }
    assert_eq!(a.reads.total(), 6);
}
