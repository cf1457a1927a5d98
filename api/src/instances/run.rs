//! Making instances: what a request asks for, whether it can be, and the records that say so. All of the
//! instances of a request are made, or none; their drivers do the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use pulau_vmm::config::MacAddr;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::host::Host;
use super::volumes::{self, MOST_ATTACHED, usable_snapshot, volume_size};
use super::{Service, capacity, find, idempotency, ports};
use crate::image::Root;
use crate::model::{
    Desired, Image, ImageState, Instance, InstanceState, InstanceType, Interface, Kind, Network,
    PublishedPort, ShutdownBehavior, Size, Snapshot, StatusChecks, Volume, VolumeAttachment, VolumeState,
    check_tags, id, yes,
};
use crate::network::addresses::{self, AddressError};
use crate::network::is_label;
use crate::records::{Changes, Tables};

/// Most instances of one request.
const MAX_COUNT: u32 = 1000;
/// EC2's limit on user data, in bytes before base64.
const USER_DATA: usize = 16 * 1024;
/// Root disk where nothing is said, in bytes. Only what is written takes space.
const ROOT_SIZE: u64 = 8 << 30;
const GIB: u64 = 1 << 30;
/// Security groups of one instance.
const MAX_GROUPS: usize = 5;

/// A request to run instances.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunInstances {
    /// Id or name of an image.
    pub image: String,
    /// A type's name, or `custom` with `vcpus` and `memory_mib`.
    #[serde(default = "default_type")]
    pub instance_type: String,
    #[serde(default)]
    pub vcpus: Option<u8>,
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// At least so many, or none. 1 if absent.
    #[serde(default)]
    pub min_count: Option<u32>,
    /// As many as there is room for, up to this. `min_count` if absent.
    #[serde(default)]
    pub max_count: Option<u32>,
    /// Name of a key pair.
    #[serde(default)]
    pub key_name: Option<String>,
    /// Base64, at most 16 KiB before that.
    #[serde(default)]
    pub user_data: Option<String>,
    /// Id or name of a network; the default one if absent.
    #[serde(default)]
    pub network: Option<String>,
    /// An address in the network, for one instance; a free one if absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub private_address: Option<Ipv4Addr>,
    /// Ids or names of security groups of the network; its group `default` if absent.
    #[serde(default)]
    pub security_groups: Vec<String>,
    /// Ports of the host that lead to it, for one instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published_ports: Vec<PublishedPort>,
    /// GiB, at least what the image needs.
    #[serde(default)]
    pub root_size_gib: Option<u64>,
    /// Disks besides the root disk, in the order in which the guest has them.
    #[serde(default)]
    pub volumes: Vec<InstanceVolume>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub termination_protection: bool,
    /// Boot it anew when its VMM or its agent, having answered before, does not any more. True if absent.
    #[serde(default = "yes")]
    pub auto_recovery: bool,
    #[serde(default)]
    pub shutdown_behavior: ShutdownBehavior,
    /// Makes the request safe to send again, with the same answer.
    #[serde(default)]
    pub client_token: Option<String>,
    /// Only checks.
    #[serde(default)]
    pub dry_run: bool,
}

/// A volume of an instance that is run: one that exists, or a new one.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceVolume {
    /// One that is available, for one instance.
    #[serde(default)]
    pub volume_id: Option<String>,
    /// A new one of this size: 1 to 16383.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16383)]
    pub size_gib: Option<u64>,
    /// A new one of this snapshot.
    #[serde(default)]
    pub snapshot_id: Option<String>,
    /// Whether it goes when the instance is terminated. A new one does if this is absent, an existing one does not.
    #[serde(default)]
    pub delete_on_termination: Option<bool>,
    /// Of a new one.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

fn default_type() -> String {
    "micro".into()
}

impl Service {
    /// Runs instances.
    ///
    /// # Errors
    ///
    /// Something in the request cannot be, or the host has no room. Nothing was made then.
    pub async fn run(&self, request: RunInstances) -> Result<Vec<Arc<Instance>>, Error> {
        let checked = Checked::new(&request)?;
        ports::refuse_listening(&request.published_ports)?;
        let token = request.client_token.as_deref();
        let ids = self.host.records.update(|tables, changes| {
            if let Some(made) = idempotency::find(tables, "run-instances", token, &request)? {
                return Ok(made);
            }
            let instances = plan(&self.host, tables, &request, &checked)?;
            let volumes = data_volumes(&self.host, tables, changes, &request, &instances)?;
            if request.dry_run {
                return Err(Error::DryRun);
            }
            for (instance, volume) in &instances {
                changes.create(instance);
                changes.create(volume);
            }
            for volume in &volumes {
                match tables.volumes.get(&volume.id) {
                    Some(_) => changes.replace(tables, volume),
                    None => changes.create(volume),
                }
            }
            let ids: Vec<String> = instances.into_iter().map(|(instance, _)| instance.id).collect();
            idempotency::remember(&self.host, changes, "run-instances", token, &request, ids.clone());
            Ok(ids)
        });
        let ids = ids.await?;
        let tables = self.host.records.read();
        Ok(ids.iter().filter_map(|id| tables.instances.get(id).cloned()).collect())
    }
}

/// What can be said of a request without looking at anything else.
struct Checked {
    size: Size,
    min: u32,
    max: u32,
}

impl Checked {
    fn new(request: &RunInstances) -> Result<Self, Error> {
        let size = size(&request.instance_type, request.vcpus, request.memory_mib)?;
        let min = request.min_count.unwrap_or(1);
        let max = request.max_count.unwrap_or(min);
        if !(1..=MAX_COUNT).contains(&min) {
            return Err(Error::invalid("min_count", format_args!("must be 1 to {MAX_COUNT}")));
        }
        if !(min..=MAX_COUNT).contains(&max) {
            return Err(Error::invalid("max_count", format_args!("must be min_count to {MAX_COUNT}")));
        }
        if request.private_address.is_some() && max != 1 {
            return Err(Error::invalid("private_address", "is for one instance, not for several"));
        }
        if !request.published_ports.is_empty() && max != 1 {
            return Err(Error::invalid("published_ports", "are of one instance, not of several"));
        }
        ports::check(&request.published_ports)?;
        if let Some(data) = &request.user_data {
            check_user_data(data)?;
        }
        check_tags(&request.tags)?;
        check_volumes(&request.volumes, max)?;
        Ok(Checked { size, min, max })
    }
}

fn check_volumes(volumes: &[InstanceVolume], max: u32) -> Result<(), Error> {
    let invalid = |problem: &str| Err(Error::invalid("volumes", problem));
    if volumes.len() > MOST_ATTACHED {
        return Err(Error::invalid("volumes", format_args!("at most {MOST_ATTACHED} are possible")));
    }
    let mut seen = BTreeSet::new();
    for volume in volumes {
        check_tags(&volume.tags)?;
        let Some(id) = &volume.volume_id else { continue };
        if volume.size_gib.is_some() || volume.snapshot_id.is_some() || !volume.tags.is_empty() {
            return invalid(
                "size_gib, snapshot_id and tags are for new volumes, not for one with a volume_id",
            );
        }
        if max != 1 {
            return invalid("a volume that exists is for one instance, not for several");
        }
        if !seen.insert(id) {
            return invalid("a volume can be attached once only");
        }
    }
    Ok(())
}

/// The size that a type, or the numbers given for a custom one, stand for.
///
/// # Errors
///
/// There is no such type, or no machine could have these numbers.
pub fn size(name: &str, vcpus: Option<u8>, memory_mib: Option<u64>) -> Result<Size, Error> {
    if let Some(known) = InstanceType::named(name) {
        return match (vcpus, memory_mib) {
            (None, None) => Ok(known.size),
            _ => Err(Error::invalid("vcpus", "vcpus and memory_mib are for instance_type \"custom\"")),
        };
    }
    if name != InstanceType::CUSTOM {
        return Err(Error::not_found(Kind::InstanceType, name));
    }
    let (Some(vcpus), Some(memory_mib)) = (vcpus, memory_mib) else {
        return Err(Error::invalid("instance_type", "custom needs vcpus and memory_mib"));
    };
    if !(1..=32).contains(&vcpus) {
        return Err(Error::invalid("vcpus", "must be 1 to 32"));
    }
    if !(64..=1 << 20).contains(&memory_mib) {
        return Err(Error::invalid("memory_mib", "must be 64 to 1048576"));
    }
    Ok(Size { vcpus, memory_mib })
}

/// Checks user data: base64 of at most 16 KiB of text, which is what the metadata service can carry.
pub(super) fn check_user_data(data: &str) -> Result<(), Error> {
    let invalid = |problem: &str| Error::invalid("user_data", problem);
    let bytes = BASE64.decode(data).map_err(|_| invalid("must be base64"))?;
    if bytes.len() > USER_DATA {
        return Err(invalid("must be at most 16384 bytes before base64"));
    }
    std::str::from_utf8(&bytes).map(drop).map_err(|_| invalid("must be UTF-8 text before base64"))
}

/// The records of the instances that a request makes.
fn plan(
    host: &Host,
    tables: &Tables,
    request: &RunInstances,
    checked: &Checked,
) -> Result<Vec<(Instance, Volume)>, Error> {
    let image = find::image(tables, &request.image)?;
    let root_size = root_size(&image, request.root_size_gib)?;
    if let Some(name) = &request.key_name
        && !tables.key_pairs.iter().any(|key| key.name == *name)
    {
        return Err(Error::not_found(Kind::KeyPair, name));
    }
    let network = find::network(tables, request.network.as_deref())?;
    let groups = groups(tables, &network, &request.security_groups)?;
    ports::refuse_taken(tables, &request.published_ports)?;
    let count = admit(host, tables, checked)?;
    let addresses = addresses(tables, &network, request.private_address, count, checked.min)?;
    let now = host.now();
    let made = addresses.into_iter().zip(0..).map(|(address, launch_index)| {
        let id = id::new(id::INSTANCE);
        let root_volume = id::new(id::VOLUME);
        let octets = address.octets();
        let instance = Instance {
            hostname: hostname(&request.tags, &id, launch_index),
            image_id: image.id.clone(),
            instance_type: request.instance_type.clone(),
            size: checked.size,
            state: InstanceState::Pending,
            state_since: now,
            state_reason: None,
            desired: Desired::Running,
            launch_time: now,
            created: now,
            key_name: request.key_name.clone(),
            interface: Interface {
                network_id: network.id.clone(),
                private_address: address,
                mac: MacAddr([6, 0, octets[0], octets[1], octets[2], octets[3]]),
                tap: host.wiring.tap_name(&id),
            },
            security_groups: groups.clone(),
            published_ports: request.published_ports.clone(),
            root_volume: root_volume.clone(),
            tags: request.tags.clone(),
            termination_protection: request.termination_protection,
            auto_recovery: request.auto_recovery,
            shutdown_behavior: request.shutdown_behavior,
            status: StatusChecks::default(),
            boot: None,
            generation: 1,
            user_data: request.user_data.clone(),
            force_stop: false,
            launch_index,
            id: id.clone(),
        };
        let attachment = VolumeAttachment { instance_id: id, index: 0, delete_on_termination: true };
        let volume = Volume {
            id: root_volume,
            size: root_size,
            state: VolumeState::InUse,
            state_reason: None,
            progress: None,
            snapshot_id: None,
            attachment: Some(attachment),
            created: now,
            tags: BTreeMap::new(),
        };
        (instance, volume)
    });
    Ok(made.collect())
}

/// The records of the volumes besides root disks: those that exist, attached, and new ones.
fn data_volumes(
    host: &Host,
    tables: &Tables,
    changes: &mut Changes,
    request: &RunInstances,
    instances: &[(Instance, Volume)],
) -> Result<Vec<Volume>, Error> {
    let mut volumes = Vec::new();
    for (instance, _) in instances {
        for (wanted, index) in request.volumes.iter().zip(1..) {
            let mut volume = match &wanted.volume_id {
                Some(id) => free_volume(tables, id)?,
                None => {
                    let snapshot = wanted.snapshot_id.as_deref();
                    let snapshot = snapshot.map(|id| usable_snapshot(tables, id)).transpose()?;
                    if let Some(snapshot) = &snapshot {
                        changes.expect_unchanged::<Snapshot>(tables, &snapshot.id);
                    }
                    Volume {
                        id: id::new(id::VOLUME),
                        size: volume_size(wanted.size_gib, snapshot.as_deref())?,
                        state: VolumeState::Creating,
                        state_reason: None,
                        progress: None,
                        snapshot_id: wanted.snapshot_id.clone(),
                        attachment: None,
                        created: host.now(),
                        tags: wanted.tags.clone(),
                    }
                }
            };
            let is_new = volume.state == VolumeState::Creating;
            volume.attachment = Some(VolumeAttachment {
                instance_id: instance.id.clone(),
                index,
                delete_on_termination: wanted.delete_on_termination.unwrap_or(is_new),
            });
            volumes.push(volume);
        }
    }
    Ok(volumes)
}

/// A volume that an instance can have, as it is when it has it.
fn free_volume(tables: &Tables, id: &str) -> Result<Volume, Error> {
    let mut volume = (*find::volume(tables, id)?).clone();
    volumes::check_free(tables, &volume)?;
    volume.state = VolumeState::InUse;
    Ok(volume)
}

/// The bytes of an instance's own disk.
fn root_size(image: &Image, wanted_gib: Option<u64>) -> Result<u64, Error> {
    let Some(manifest) = image.manifest.as_ref().filter(|_| image.state == ImageState::Available) else {
        return Err(Error::State {
            kind: Kind::Image,
            id: image.id.clone(),
            state: format!("{:?}", image.state).to_lowercase(),
            needed: "instances are made from available ones",
        });
    };
    let least = match &manifest.root {
        Root::Erofs { layer, .. } => layer.as_ref().map_or(GIB / 4, |layer| layer.size),
        Root::Disk { blob, .. } => blob.size,
    };
    let Some(gib) = wanted_gib else { return Ok(least.max(ROOT_SIZE)) };
    let size = gib.checked_mul(GIB).filter(|size| (least..=1 << 44).contains(size));
    size.ok_or_else(|| {
        let least = least.div_ceil(GIB);
        Error::invalid(
            "root_size_gib",
            format_args!("must be {least} (as image {} needs) to 16384", image.id),
        )
    })
}

pub(super) fn groups(tables: &Tables, network: &Network, wanted: &[String]) -> Result<Vec<String>, Error> {
    let default = ["default".to_owned()];
    let wanted = if wanted.is_empty() { &default[..] } else { wanted };
    let mut groups = Vec::with_capacity(wanted.len());
    for name in wanted {
        let id = find::security_group(tables, &network.id, name)?.id.clone();
        if !groups.contains(&id) {
            groups.push(id);
        }
    }
    if groups.len() > MAX_GROUPS {
        return Err(Error::invalid("security_groups", format_args!("at most {MAX_GROUPS} are possible")));
    }
    Ok(groups)
}

/// How many instances there is room for on this host.
fn admit(host: &Host, tables: &Tables, checked: &Checked) -> Result<u32, Error> {
    capacity::refuse_if_cordoned(tables)?;
    let (vcpus, memory_mib) = free(host, tables);
    let by_vcpus = vcpus / u32::from(checked.size.vcpus);
    let by_memory = memory_mib / checked.size.memory_mib;
    let room = by_vcpus.min(u32::try_from(by_memory).unwrap_or(u32::MAX));
    if room < checked.min {
        return Err(Error::NoCapacity(format!(
            "the host has {vcpus} vCPUs and {memory_mib} MiB left; {} instances of {} vCPUs and {} MiB need more: \
             stop or terminate others, or ask for smaller ones",
            checked.min, checked.size.vcpus, checked.size.memory_mib,
        )));
    }
    Ok(room.min(checked.max))
}

/// vCPUs and memory that no instance takes.
pub(super) fn free(host: &Host, tables: &Tables) -> (u32, u64) {
    let used = capacity::used(tables);
    (host.limits.vcpus.saturating_sub(used.vcpus), host.limits.memory_mib.saturating_sub(used.memory_mib))
}

/// Addresses for `count` instances, or for as many as there are, at least `min`.
fn addresses(
    tables: &Tables,
    network: &Network,
    wanted: Option<Ipv4Addr>,
    count: u32,
    min: u32,
) -> Result<Vec<Ipv4Addr>, Error> {
    let instances = tables.instances.iter().filter(|instance| instance.state != InstanceState::Terminated);
    let used: BTreeSet<Ipv4Addr> = instances.map(|instance| instance.interface.private_address).collect();
    if let Some(address) = wanted {
        let problem = match addresses::claim(network.subnet, &used, address) {
            Ok(()) => return Ok(vec![address]),
            Err(taken @ AddressError::Taken { .. }) => taken.to_string(),
            Err(_) => format!("{address} is none that {} gives to instances", network.subnet),
        };
        return Err(Error::invalid("private_address", problem));
    }
    let found: Vec<Ipv4Addr> = addresses::free(network.subnet, &used).take(count as usize).collect();
    if found.len() < min as usize {
        return Err(Error::NoAddress { network: network.id.clone() });
    }
    Ok(found)
}

/// The tag `Name`, where that can be a host name, or else the id.
fn hostname(tags: &BTreeMap<String, String>, id: &str, index: u32) -> String {
    let name = tags.get("Name").map(|name| name.to_ascii_lowercase()).unwrap_or_default();
    // With room for the index.
    match (is_label(&name, 56), index) {
        (false, _) => id.to_owned(),
        (true, 0) => name,
        (true, index) => format!("{name}-{index}"),
    }
}
