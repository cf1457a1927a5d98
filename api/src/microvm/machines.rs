//! Where microVMs run: on this host, or in a simulation of one.
//!
//! Services are written against [`Machines`] and get the same [`MicroVm`] handles from both.

use std::io;

use super::handle::MicroVm;
use super::home::{self, HomeError};
use super::sim::Simulation;
use super::spec::{Host, Spec};

/// A place for microVMs. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Machines {
    /// This host, with its KVM.
    Host(Host),
    /// Nowhere: for tests, and for benchmarks of everything but microVMs.
    Simulated(Simulation),
}

impl Machines {
    /// As [`MicroVm::create`].
    pub fn create(&self, spec: Spec) -> MicroVm {
        match self {
            Machines::Host(host) => MicroVm::create(host.clone(), spec),
            Machines::Simulated(simulation) => simulation.create(spec),
        }
    }

    /// As [`MicroVm::adopt`].
    ///
    /// # Errors
    ///
    /// There is none of this name, or somebody drives it.
    pub fn adopt(&self, id: &str) -> Result<MicroVm, HomeError> {
        match self {
            Machines::Host(host) => MicroVm::adopt(host, id),
            Machines::Simulated(simulation) => simulation.adopt(id),
        }
    }

    /// The names of all microVMs there are, driven or left by whoever drove them. To be asked after a restart:
    /// adopt those that are known, then [`Self::sweep`] the rest.
    ///
    /// # Errors
    ///
    /// The host's directory of them cannot be read.
    pub async fn list(&self) -> io::Result<Vec<String>> {
        match self {
            Machines::Host(host) => {
                let run_dir = host.run_dir.clone();
                tokio::task::spawn_blocking(move || home::homes(&run_dir)).await?
            }
            Machines::Simulated(simulation) => Ok(simulation.list()),
        }
    }

    /// Ends and removes those that nobody drives, and returns their names.
    ///
    /// # Errors
    ///
    /// The first one that could not be removed; the others were.
    pub async fn sweep(&self) -> io::Result<Vec<String>> {
        match self {
            Machines::Host(host) => {
                let run_dir = host.run_dir.clone();
                tokio::task::spawn_blocking(move || home::sweep(&run_dir)).await?
            }
            Machines::Simulated(simulation) => Ok(simulation.sweep()),
        }
    }
}
