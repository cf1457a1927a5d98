use super::*;
use crate::arch::vcpu_state::VcpuState;
use crate::config::{BootSourceConfig, DriveConfig, FullVmConfig, VmConfig};

/// The state of a machine that KVM need not be there for.
fn state() -> State {
    let mut config = VmConfig::default();
    let drive: DriveConfig =
        serde_json::from_str(r#"{"drive_id": "root", "is_root_device": true, "path_on_host": "r"}"#).unwrap();
    config.set_drive(drive).unwrap();
    let boot = BootSourceConfig { kernel_image_path: "k".into(), ..Default::default() };
    config.set_boot_source(boot).unwrap();
    State {
        made_by: "test".into(),
        config: serde_json::to_string(&FullVmConfig::from(&config)).unwrap(),
        memory: vec![crate::snapshot::state::Region { start: 0, len: 128 << 20 }],
        vm: crate::arch::vm_state::VmState::default(),
        vcpus: vec![VcpuState::default()],
        transports: Vec::new(),
        balloon: None,
        serial: Default::default(),
        keyboard: Default::default(),
        acpi: true,
    }
}

#[test]
fn what_was_written_is_read() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write(&state(), file.as_file_mut()).unwrap();
    let read = read(file.path()).unwrap();
    assert_eq!(encode(&read).unwrap(), encode(&state()).unwrap());
    assert_eq!(read.configuration().unwrap().drives[0].drive_id, "root");
    assert_eq!(read.memory_len(), 128 << 20);
}

#[test]
fn what_is_not_whole_is_refused() {
    let bytes = encode(&state()).unwrap();
    for len in 0..bytes.len() {
        let error = decode(&bytes[..len]).unwrap_err();
        assert!(matches!(error, FileError::Foreign | FileError::Length { .. }), "{len}: {error}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(decode(&longer), Err(FileError::Length { .. })));
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        assert!(decode(&changed).is_err(), "byte {at}");
    }
    assert!(matches!(decode(&[0; 4096]), Err(FileError::Foreign)));
}

#[test]
fn other_versions_and_architectures_are_refused_by_name() {
    let mut bytes = encode(&state()).unwrap();
    bytes[8] = 9;
    assert_eq!(
        decode(&bytes).unwrap_err().to_string(),
        "its format has version 9, and this program knows versions up to 1"
    );
    bytes[8] = 1;
    bytes[12] = 183;
    assert!(matches!(decode(&bytes), Err(FileError::Architecture(183))));
}

#[test]
fn parts_that_do_not_fit_each_other_are_refused() {
    let error = |change: fn(&mut State)| {
        let mut state = state();
        change(&mut state);
        state.configuration().unwrap_err().to_string()
    };
    assert_eq!(error(|s| s.memory[0].len += 4096), "its memory regions are not those of its configuration");
    assert_eq!(error(|s| s.vcpus.clear()), "its vCPUs are not those of its configuration");
    assert!(error(|s| s.config = "{".into()).starts_with("its configuration: "));
    let wrong = error(|s| s.config = r#"{"machine-config": {"vcpu_count": 99, "mem_size_mib": 1}}"#.into());
    assert!(wrong.contains("vcpu_count"), "{wrong}");
}
