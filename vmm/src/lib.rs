//! The Pulau virtual machine monitor.
