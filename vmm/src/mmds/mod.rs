//! The metadata service: a JSON document the client writes over the control API and the guest reads over
//! HTTP at a link-local address, as on EC2. Firecracker calls it MMDS.
//!
//! Here are the document, its tokens, the service as a function from the bytes of a request to the bytes of a
//! response, and the small network stack through which the guest reaches it ([`MmdsNetwork`]). The guest
//! is hostile: nothing here grows or waits at its will.

mod network;
mod service;
mod store;
mod token;

use std::sync::{Arc, Mutex};

pub use network::{MAX_FRAME, MmdsNetwork, PREFIX};
pub use service::{GUEST_LIMITS, Served};
pub use store::MmdsError;

use crate::config::MmdsVersion;
use store::Store;
use token::Tokens;

/// The metadata of one microVM, shared by the control API and the network device.
pub type SharedMmds = Arc<Mutex<Mmds>>;

/// The metadata of one microVM. See the module's text.
#[derive(Debug)]
pub struct Mmds {
    store: Store,
    tokens: Tokens,
    version: MmdsVersion,
    imds_compat: bool,
}

impl Mmds {
    /// No metadata yet; at most `limit` bytes of it as JSON text.
    pub fn new(limit: usize) -> Self {
        Self {
            store: Store::new(limit),
            tokens: Tokens::default(),
            version: MmdsVersion::default(),
            imds_compat: false,
        }
    }

    /// Sets which requests of the guest are answered, and whether always in EC2's format.
    pub fn configure(&mut self, version: MmdsVersion, imds_compat: bool) {
        self.version = version;
        self.imds_compat = imds_compat;
    }

    /// Replaces the document.
    pub fn put(&mut self, document: serde_json::Value) -> Result<(), MmdsError> {
        self.store.put(document)
    }

    /// Changes the document by a JSON merge patch (RFC 7396).
    pub fn patch(&mut self, patch: &serde_json::Value) -> Result<(), MmdsError> {
        self.store.patch(patch)
    }

    /// The document as JSON text; `{}` if there is none.
    pub fn json(&self) -> String {
        self.store.json()
    }
}
