//! What an instance can read about itself at 169.254.169.254, in EC2's form.
//!
//! The VMM serves it (see its documentation): a path is a way into this document, an object is shown as the
//! list of its keys.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use crate::model::Instance;
use crate::records::Tables;

/// Versions of the interface under which the document is found; cloud-init asks for the second.
const VERSIONS: [&str; 2] = ["latest", "2009-04-04"];

/// The document for one instance.
pub fn document(tables: &Tables, instance: &Instance) -> Value {
    let mut own = json!({ "meta-data": metadata(tables, instance) });
    own["dynamic"] = json!({ "instance-identity": { "document": identity(instance).to_string() } });
    let user_data = instance.user_data.as_ref().and_then(|data| BASE64.decode(data).ok());
    if let Some(text) = user_data.and_then(|bytes| String::from_utf8(bytes).ok()) {
        own["user-data"] = Value::String(text);
    }
    VERSIONS.iter().map(|version| ((*version).to_owned(), own.clone())).collect::<Map<_, _>>().into()
}

fn metadata(tables: &Tables, instance: &Instance) -> Value {
    let address = instance.interface.private_address.to_string();
    let network = tables.networks.get(&instance.interface.network_id);
    let domain = network.map_or_else(|| "internal".to_owned(), |network| network.domain());
    let mac = instance.interface.mac.to_string();
    let fqdn = format!("{}.{domain}", instance.hostname);
    let groups = instance.security_groups.iter().filter_map(|id| tables.security_groups.get(id));
    let groups: Vec<&str> = groups.map(|group| group.name.as_str()).collect();
    let mut data = json!({
        "instance-id": instance.id,
        "ami-id": instance.image_id,
        "ami-launch-index": instance.launch_index.to_string(),
        "instance-type": instance.instance_type,
        "hostname": fqdn,
        "local-hostname": fqdn,
        "local-ipv4": address,
        "mac": mac,
        "security-groups": groups.join("\n"),
        "instance-life-cycle": "on-demand",
        "placement": { "availability-zone": "local", "region": "local" },
        "services": { "domain": "pulau", "partition": "pulau" },
        "tags": { "instance": instance.tags },
        "network": { "interfaces": { "macs": { (mac.clone()): {
            "device-number": "0",
            "mac": mac,
            "local-hostname": fqdn,
            "local-ipv4s": address,
            "subnet-ipv4-cidr-block": network.map(|network| network.subnet.to_string()).unwrap_or_default(),
        }}}},
    });
    let key =
        instance.key_name.as_ref().and_then(|name| tables.key_pairs.iter().find(|key| key.name == *name));
    if let Some(key) = key {
        // As EC2 lists keys, `0=name`; and where that leads to.
        data["public-keys"] = json!({
            (format!("0={}", key.name)): key.public_key,
            "0": { "openssh-key": key.public_key },
        });
    }
    data
}

fn identity(instance: &Instance) -> Value {
    json!({
        "version": "2017-09-30",
        "instanceId": instance.id,
        "imageId": instance.image_id,
        "instanceType": instance.instance_type,
        "privateIp": instance.interface.private_address.to_string(),
        "pendingTime": instance.launch_time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        "architecture": "x86_64",
        "availabilityZone": "local",
        "region": "local",
    })
}
