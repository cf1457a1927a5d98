//! Things by their id or their name.

use std::sync::Arc;

use super::error::Error;
use crate::model::{Image, Instance, Kind, Network, SecurityGroup, Snapshot, Volume};
use crate::records::Tables;

pub fn instance(tables: &Tables, id: &str) -> Result<Arc<Instance>, Error> {
    tables.instances.get(id).cloned().ok_or_else(|| Error::not_found(Kind::Instance, id))
}

pub fn volume(tables: &Tables, id: &str) -> Result<Arc<Volume>, Error> {
    tables.volumes.get(id).cloned().ok_or_else(|| Error::not_found(Kind::Volume, id))
}

pub fn snapshot(tables: &Tables, id: &str) -> Result<Arc<Snapshot>, Error> {
    tables.snapshots.get(id).cloned().ok_or_else(|| Error::not_found(Kind::Snapshot, id))
}

pub fn image(tables: &Tables, id: &str) -> Result<Arc<Image>, Error> {
    let found = tables.images.get(id).or_else(|| tables.images.iter().find(|image| image.name == id));
    found.cloned().ok_or_else(|| Error::not_found(Kind::Image, id))
}

/// The default one if none is named.
pub fn network(tables: &Tables, id: Option<&str>) -> Result<Arc<Network>, Error> {
    let found = match id {
        Some(id) => {
            tables.networks.get(id).or_else(|| tables.networks.iter().find(|network| network.name == id))
        }
        None => tables.networks.iter().find(|network| network.is_default),
    };
    found.cloned().ok_or_else(|| Error::not_found(Kind::Network, id.unwrap_or("default")))
}

/// One of a network.
pub fn security_group(tables: &Tables, network: &str, id: &str) -> Result<Arc<SecurityGroup>, Error> {
    let own = |group: &&Arc<SecurityGroup>| group.network_id == network;
    let by_id = tables.security_groups.get(id).filter(own);
    let found = by_id.or_else(|| tables.security_groups.iter().filter(own).find(|group| group.name == id));
    found.cloned().ok_or_else(|| Error::not_found(Kind::SecurityGroup, id))
}
