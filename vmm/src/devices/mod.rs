//! Emulated devices that are not virtio: serial port, keyboard controller, power and panic ports, boot timer.

pub mod boot_timer;
pub mod i8042;
pub mod power;
pub mod serial;
