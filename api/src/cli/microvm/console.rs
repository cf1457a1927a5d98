//! The guest's console as it comes, for whoever wants to see it boot.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::sleep;

use crate::microvm::MicroVm;

/// Copies the microVM's console to standard error until it is cancelled.
pub async fn follow(vm: &MicroVm) {
    let path = wait_for_path(vm).await;
    let Ok(mut file) = File::open(path) else { return };
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => sleep(Duration::from_millis(20)).await,
            Ok(length) if std::io::stderr().write_all(&buffer[..length]).is_ok() => {
                // Lets others run even if the guest writes without pause.
                tokio::task::yield_now().await;
            }
            _ => return,
        }
    }
}

async fn wait_for_path(vm: &MicroVm) -> PathBuf {
    loop {
        match vm.console_log() {
            Some(path) => return path,
            None => sleep(Duration::from_millis(1)).await,
        }
    }
}
