//! Key pairs: made here, or brought along.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ssh_key::{Algorithm, HashAlg, LineEnding, PrivateKey, PublicKey};
use utoipa::ToSchema;

use super::Service;
use super::error::Error;
use crate::model::{KeyPair, Kind, check_name, check_tags, id};

/// Longest public key, in bytes.
const LENGTH: usize = 16 * 1024;

/// A request to make or import a key pair.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKeyPair {
    pub name: String,
    /// In OpenSSH's form, to import one; a new Ed25519 pair is made if absent.
    #[serde(default)]
    pub public_key: Option<String>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// A key pair, and its private half if it was made here.
#[derive(Debug, Serialize, ToSchema)]
pub struct CreatedKeyPair {
    #[serde(flatten)]
    pub key_pair: KeyPair,
    /// In OpenSSH's form. Shown this once and kept nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub private_key: Option<String>,
}

impl Service {
    /// Makes or imports a key pair.
    ///
    /// # Errors
    ///
    /// There is one of this name, or the public key is none.
    pub async fn create_key_pair(&self, request: CreateKeyPair) -> Result<CreatedKeyPair, Error> {
        check_name(&request.name)?;
        check_tags(&request.tags)?;
        let failed = |error: ssh_key::Error| Error::Internal(format!("cannot make a key: {error}"));
        let (public, private) = match &request.public_key {
            Some(text) => (parse(text)?, None),
            None => {
                let mut key =
                    PrivateKey::random(&mut ssh_key::rand_core::OsRng, Algorithm::Ed25519).map_err(failed)?;
                key.set_comment(&request.name);
                let text = key.to_openssh(LineEnding::LF).map_err(failed)?.to_string();
                (key.public_key().clone(), Some(text))
            }
        };
        let key_pair = KeyPair {
            id: id::new(id::KEY_PAIR),
            name: request.name.clone(),
            public_key: public.to_openssh().map_err(failed)?,
            fingerprint: public.fingerprint(HashAlg::Sha256).to_string(),
            created: self.host.now(),
            tags: request.tags,
        };
        self.host
            .records
            .update(|tables, changes| {
                if tables.key_pairs.iter().any(|known| known.name == key_pair.name) {
                    return Err(Error::Exists { kind: Kind::KeyPair, name: key_pair.name.clone() });
                }
                changes.create(&key_pair);
                Ok(())
            })
            .await?;
        Ok(CreatedKeyPair { key_pair, private_key: private })
    }

    /// Removes a key pair, by id or name. Instances that have it keep it.
    ///
    /// # Errors
    ///
    /// There is none.
    pub async fn delete_key_pair(&self, id: &str) -> Result<(), Error> {
        self.host
            .records
            .update(|tables, changes| {
                let known = tables.key_pairs.iter().find(|key| key.id == id || key.name == id);
                let known = known.ok_or_else(|| Error::not_found(Kind::KeyPair, id))?;
                changes.delete::<KeyPair>(tables, &known.id);
                Ok(())
            })
            .await
    }

    /// All key pairs, in order of their names.
    pub fn key_pairs(&self) -> Vec<Arc<KeyPair>> {
        let mut all: Vec<_> = self.host.records.read().key_pairs.iter().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

fn parse(text: &str) -> Result<PublicKey, Error> {
    let problem = "must be one line of an authorized_keys file, such as `ssh-ed25519 AAAA… me@host`";
    let line = text.trim();
    if line.len() > LENGTH || line.contains(['\n', '\r']) {
        return Err(Error::invalid("public_key", problem));
    }
    PublicKey::from_openssh(line)
        .map_err(|error| Error::invalid("public_key", format_args!("{problem} ({error})")))
}
