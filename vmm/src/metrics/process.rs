//! What is counted once in the process. The names are Firecracker's; what has no name there is our own.

use super::{Group, group};

group! {
    /// The control API's process.
    pub struct ApiServerMetrics {
        /// Wall clock from `--start-time-us` until the API answers, in microseconds.
        process_startup_time_us: Gauge,
        /// CPU time from `--start-time-cpu-us` until the API answers, in microseconds.
        process_startup_time_cpu_us: Gauge,
        /// Connections accepted.
        connections: Counter,
        /// Connections closed to make room for newer ones.
        connections_evicted: Counter,
        /// Requests that could not be read as HTTP.
        malformed_requests: Counter,
    }
}

group! {
    /// Requests with GET.
    pub struct GetMetrics {
        count: Counter,
        fails: Counter,
        instance_info_count: Counter,
        machine_cfg_count: Counter,
        mmds_count: Counter,
        vmm_version_count: Counter,
    }
}

group! {
    /// Requests with PUT.
    pub struct PutMetrics {
        count: Counter,
        fails: Counter,
        actions_count: Counter,
        actions_fails: Counter,
        boot_source_count: Counter,
        boot_source_fails: Counter,
        drive_count: Counter,
        drive_fails: Counter,
        logger_count: Counter,
        logger_fails: Counter,
        machine_cfg_count: Counter,
        machine_cfg_fails: Counter,
        cpu_cfg_count: Counter,
        cpu_cfg_fails: Counter,
        metrics_count: Counter,
        metrics_fails: Counter,
        network_count: Counter,
        network_fails: Counter,
        mmds_count: Counter,
        mmds_fails: Counter,
        vsock_count: Counter,
        vsock_fails: Counter,
        pmem_count: Counter,
        pmem_fails: Counter,
        serial_count: Counter,
        serial_fails: Counter,
    }
}

group! {
    /// Requests with PATCH.
    pub struct PatchMetrics {
        count: Counter,
        fails: Counter,
        drive_count: Counter,
        drive_fails: Counter,
        network_count: Counter,
        network_fails: Counter,
        machine_cfg_count: Counter,
        machine_cfg_fails: Counter,
        mmds_count: Counter,
        mmds_fails: Counter,
        pmem_count: Counter,
        pmem_fails: Counter,
    }
}

group! {
    /// Requests made in a way that will go away.
    pub struct DeprecatedMetrics {
        deprecated_http_api_calls: Counter,
    }
}

group! {
    /// The log and the metrics themselves.
    pub struct LoggerMetrics {
        /// Lines of metrics that could not be written.
        missed_metrics_count: Counter,
        /// Lines of metrics that could not be written when they were due.
        metrics_fails: Counter,
        /// Log lines that could not be written.
        missed_log_count: Counter,
        /// Log lines left out because there were too many.
        rate_limited_log_count: Counter,
    }
}

group! {
    /// How long requests took, in microseconds; the last of each kind.
    pub struct LatencyMetrics {
        pause_vm: Gauge,
        resume_vm: Gauge,
        full_create_snapshot: Gauge,
        load_snapshot: Gauge,
    }
}

group! {
    /// The metadata service.
    pub struct MmdsMetrics {
        rx_accepted: Counter,
        rx_accepted_err: Counter,
        rx_accepted_unusual: Counter,
        rx_bad_eth: Counter,
        rx_invalid_token: Counter,
        rx_no_token: Counter,
        rx_count: Counter,
        tx_bytes: Counter,
        tx_count: Counter,
        tx_errors: Counter,
        tx_frames: Counter,
        connections_created: Counter,
        connections_destroyed: Counter,
    }
}

group! {
    /// What vCPUs left the guest for.
    pub struct VcpuMetrics {
        exit_io_in: Counter,
        exit_io_out: Counter,
        exit_mmio_read: Counter,
        exit_mmio_write: Counter,
        /// vCPUs that could not go on.
        failures: Counter,
    }
}

group! {
    /// The serial console.
    pub struct UartMetrics {
        missed_read_count: Counter,
        missed_write_count: Counter,
        read_count: Counter,
        write_count: Counter,
        rate_limiter_dropped_bytes: Counter,
    }
}

group! {
    /// The keyboard controller.
    pub struct I8042Metrics {
        read_count: Counter,
        reset_count: Counter,
        write_count: Counter,
    }
}

group! {
    /// The process as a whole.
    pub struct VmmMetrics {
        panic_count: Gauge,
    }
}

/// What is counted once in the process.
#[derive(Debug)]
pub struct Metrics {
    pub api_server: ApiServerMetrics,
    pub get_api_requests: GetMetrics,
    pub put_api_requests: PutMetrics,
    pub patch_api_requests: PatchMetrics,
    pub deprecated_api: DeprecatedMetrics,
    pub logger: LoggerMetrics,
    pub latencies_us: LatencyMetrics,
    pub mmds: MmdsMetrics,
    pub vcpu: VcpuMetrics,
    pub uart: UartMetrics,
    pub i8042: I8042Metrics,
    pub vmm: VmmMetrics,
}

/// What is counted once in the process.
pub static METRICS: Metrics = Metrics {
    api_server: ApiServerMetrics::new(),
    get_api_requests: GetMetrics::new(),
    put_api_requests: PutMetrics::new(),
    patch_api_requests: PatchMetrics::new(),
    deprecated_api: DeprecatedMetrics::new(),
    logger: LoggerMetrics::new(),
    latencies_us: LatencyMetrics::new(),
    mmds: MmdsMetrics::new(),
    vcpu: VcpuMetrics::new(),
    uart: UartMetrics::new(),
    i8042: I8042Metrics::new(),
    vmm: VmmMetrics::new(),
};

impl Metrics {
    /// Calls `each` with every group and its name.
    pub(super) fn each_group(&self, each: &mut dyn FnMut(&'static str, &dyn Group)) {
        each("api_server", &self.api_server);
        each("get_api_requests", &self.get_api_requests);
        each("put_api_requests", &self.put_api_requests);
        each("patch_api_requests", &self.patch_api_requests);
        each("deprecated_api", &self.deprecated_api);
        each("logger", &self.logger);
        each("latencies_us", &self.latencies_us);
        each("mmds", &self.mmds);
        each("vcpu", &self.vcpu);
        each("uart", &self.uart);
        each("i8042", &self.i8042);
        each("vmm", &self.vmm);
    }
}
