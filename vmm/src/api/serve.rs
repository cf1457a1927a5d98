//! A request from beginning to end: found out, done, counted, logged, answered.

use super::{respond, route};
use crate::control::Controller;
use crate::http::{Response, Status};
use crate::metrics::{Counter, METRICS};

/// Answers a request of the control API.
pub fn serve(controller: &mut Controller, method: &str, path: &str, body: &[u8]) -> Response {
    log::debug!("API: {method} {path} with {} bytes", body.len());
    let (count, fails) = counters(method, path);
    count.into_iter().flatten().for_each(Counter::inc);
    let response = match route(method, path, body) {
        Err(error) => super::fault(Status::BadRequest, &error),
        Ok(routed) => {
            let response = respond(&controller.handle(routed.action));
            match routed.deprecated {
                None => response,
                Some(message) => {
                    METRICS.deprecated_api.deprecated_http_api_calls.inc();
                    log::warn!("API: {message}");
                    response.with_header("Deprecation", "true")
                }
            }
        }
    };
    if response.status.code() >= 400 {
        fails.into_iter().flatten().for_each(Counter::inc);
        log::error!("API: {method} {path:?}: {} {}", response.status.code(), response.body);
    }
    response
}

/// What counts a request, and what counts it if it fails: of its method, and of what it is about.
type Counters = [Option<&'static Counter>; 2];

fn counters(method: &str, path: &str) -> (Counters, Counters) {
    let kind = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    let get = &METRICS.get_api_requests;
    let put = &METRICS.put_api_requests;
    let patch = &METRICS.patch_api_requests;
    let (count, fails) = match method {
        "GET" => (&get.count, &get.fails),
        "PUT" => (&put.count, &put.fails),
        "PATCH" => (&patch.count, &patch.fails),
        _ => return ([None; 2], [None; 2]),
    };
    let (own_count, own_fails) = match (method, kind) {
        ("GET", "") => (Some(&get.instance_info_count), None),
        ("GET", "machine-config") => (Some(&get.machine_cfg_count), None),
        ("GET", "mmds") => (Some(&get.mmds_count), None),
        ("GET", "version") => (Some(&get.vmm_version_count), None),
        ("PUT", "actions") => (Some(&put.actions_count), Some(&put.actions_fails)),
        ("PUT", "boot-source") => (Some(&put.boot_source_count), Some(&put.boot_source_fails)),
        ("PUT", "drives") => (Some(&put.drive_count), Some(&put.drive_fails)),
        ("PUT", "logger") => (Some(&put.logger_count), Some(&put.logger_fails)),
        ("PUT", "machine-config") => (Some(&put.machine_cfg_count), Some(&put.machine_cfg_fails)),
        ("PUT", "cpu-config") => (Some(&put.cpu_cfg_count), Some(&put.cpu_cfg_fails)),
        ("PUT", "metrics") => (Some(&put.metrics_count), Some(&put.metrics_fails)),
        ("PUT", "network-interfaces") => (Some(&put.network_count), Some(&put.network_fails)),
        ("PUT", "mmds") => (Some(&put.mmds_count), Some(&put.mmds_fails)),
        ("PUT", "vsock") => (Some(&put.vsock_count), Some(&put.vsock_fails)),
        ("PUT", "pmem") => (Some(&put.pmem_count), Some(&put.pmem_fails)),
        ("PUT", "serial") => (Some(&put.serial_count), Some(&put.serial_fails)),
        ("PATCH", "drives") => (Some(&patch.drive_count), Some(&patch.drive_fails)),
        ("PATCH", "network-interfaces") => (Some(&patch.network_count), Some(&patch.network_fails)),
        ("PATCH", "machine-config") => (Some(&patch.machine_cfg_count), Some(&patch.machine_cfg_fails)),
        ("PATCH", "mmds") => (Some(&patch.mmds_count), Some(&patch.mmds_fails)),
        ("PATCH", "pmem") => (Some(&patch.pmem_count), Some(&patch.pmem_fails)),
        _ => (None, None),
    };
    ([Some(count), own_count], [Some(fails), own_fails])
}
