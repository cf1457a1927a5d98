//! What instances are to be like: for `pulau instance run` and `pulau group create`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::cli::microvm::MemoryArg;
use crate::cli::resource::tag;

#[derive(Debug, clap::Args)]
pub struct TemplateArgs {
    /// Id or name of an image.
    #[arg(long, short)]
    image: String,
    /// Name of a type, or custom with --cpus and --memory.
    #[arg(long = "type", short = 't', value_name = "TYPE", default_value = "micro")]
    instance_type: String,
    #[command(flatten)]
    size: Custom,
    /// Name of a key pair whose owner may log in.
    #[arg(long, value_name = "NAME")]
    key_name: Option<String>,
    /// File given to the guest: a script that runs at the first boot, or cloud-config. At most 16 KiB.
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Id or name of a network.
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Id or name of a security group; may be repeated.
    #[arg(long = "security-group", value_name = "GROUP")]
    security_groups: Vec<String>,
    /// Size of the root disk in GiB; only what is written takes space.
    #[arg(long, value_name = "GIB")]
    root_size: Option<u64>,
    /// A tag; may be repeated. `Name` is the host name, too, where it can be.
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
    tags: Vec<(String, String)>,
    /// Leave it as it is when its guest does not answer any more, rather than boot it anew.
    #[arg(long)]
    no_auto_recovery: bool,
    /// Terminate it when its guest powers itself off, rather than stop it.
    #[arg(long)]
    terminate_on_shutdown: bool,
}

#[derive(Debug, clap::Args)]
pub struct Custom {
    /// vCPUs of a custom type.
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// Memory of a custom type, such as 768M.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<MemoryArg>,
}

impl Custom {
    pub fn memory_mib(&self) -> Option<u64> {
        self.memory.map(MemoryArg::mib)
    }
}

impl TemplateArgs {
    /// The beginning of a request to run instances.
    pub fn body(&self) -> anyhow::Result<Value> {
        let tags: BTreeMap<_, _> = self.tags.iter().cloned().collect();
        Ok(json!({
            "image": self.image,
            "instance_type": self.instance_type,
            "vcpus": self.size.cpus,
            "memory_mib": self.size.memory_mib(),
            "key_name": self.key_name,
            "user_data": read_user_data(self.user_data.as_ref())?,
            "network": self.network,
            "security_groups": self.security_groups,
            "root_size_gib": self.root_size,
            "tags": tags,
            "auto_recovery": !self.no_auto_recovery,
            "shutdown_behavior": if self.terminate_on_shutdown { "terminate" } else { "stop" },
        }))
    }
}

pub fn read_user_data(file: Option<&PathBuf>) -> anyhow::Result<Option<String>> {
    let Some(file) = file else { return Ok(None) };
    let bytes = std::fs::read(file).with_context(|| format!("--user-data {}", file.display()))?;
    Ok(Some(BASE64.encode(bytes)))
}
