//! Images: imported in the background, deleted when nothing is made of them.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::{Service, find, idempotency};
use crate::files::Task;
use crate::image::DiskImport;
use crate::model::{Image, ImageState, InstanceState, Kind, check_name, check_tags, id};

/// A request to import an image from files of the host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    pub name: String,
    #[serde(default)]
    pub description: String,
    /// Absolute path of a root file system or disk image: EROFS, ext4, a raw disk with partitions, or qcow2.
    #[schema(value_type = String)]
    pub root: PathBuf,
    /// Absolute path of the kernel; found in the image if absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// Absolute path of the initial RAM disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Words for the kernel command line.
    #[serde(default)]
    pub boot_args: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub client_token: Option<String>,
}

impl Service {
    /// Begins to import an image, which is `pending` until that has been done.
    ///
    /// # Errors
    ///
    /// There is one of this name, or a path is not absolute.
    pub async fn import_image(&self, request: ImportImage) -> Result<Arc<Image>, Error> {
        check_name(&request.name)?;
        check_tags(&request.tags)?;
        let paths = [
            ("root", Some(&request.root)),
            ("kernel", request.kernel.as_ref()),
            ("initrd", request.initrd.as_ref()),
        ];
        for (field, path) in paths {
            if path.is_some_and(|path| !path.is_absolute()) {
                return Err(Error::invalid(field, "must be an absolute path on the host"));
            }
        }
        let image = Image {
            id: id::new(id::IMAGE),
            name: request.name.clone(),
            description: request.description.clone(),
            state: ImageState::Pending,
            state_reason: None,
            created: self.host.now(),
            size: 0,
            manifest: None,
            tags: request.tags.clone(),
        };
        let token = request.client_token.as_deref();
        let (id, is_new) = self
            .host
            .records
            .update(|tables, changes| {
                let known = idempotency::find(tables, "import-image", token, &request)?;
                if let Some(id) = known.and_then(|made| made.into_iter().next()) {
                    return Ok((id, false));
                }
                if tables.images.iter().any(|known| known.name == image.name) {
                    return Err(Error::Exists { kind: Kind::Image, name: image.name.clone() });
                }
                changes.create(&image);
                let made = vec![image.id.clone()];
                idempotency::remember(&self.host, changes, "import-image", token, &request, made);
                Ok((image.id.clone(), true))
            })
            .await?;
        if is_new {
            let service = self.clone();
            tokio::spawn(async move { service.do_import(&image.id, request).await });
        }
        find::image(&self.host.records.read(), &id)
    }

    async fn do_import(&self, id: &str, request: ImportImage) {
        let import = DiskImport {
            root: request.root,
            kernel: request.kernel,
            initrd: request.initrd,
            boot_args: request.boot_args,
        };
        let result = self.host.images.import_disk(import, &Task::quiet()).await;
        let finished = self.host.records.modify(id, |image: &mut Image| {
            match &result {
                Ok(manifest) => {
                    image.state = ImageState::Available;
                    image.size = manifest.size();
                    image.manifest = Some(manifest.clone());
                }
                Err(error) => {
                    image.state = ImageState::Failed;
                    image.state_reason = Some(error.to_string());
                }
            }
            Ok::<_, Error>(())
        });
        match finished.await {
            Ok(_) => tracing::info!(
                image = id,
                "imported: {}",
                if result.is_ok() { "available" } else { "failed" }
            ),
            Err(error) => tracing::error!(image = id, "its import cannot be written down: {error}"),
        }
    }

    /// Imports that a daemon did not live to finish have failed.
    pub(super) async fn fail_interrupted_imports(&self) -> Result<(), Error> {
        let pending: Vec<String> = {
            let tables = self.host.records.read();
            let pending = tables.images.iter().filter(|image| image.state == ImageState::Pending);
            pending.map(|image| image.id.clone()).collect()
        };
        for id in pending {
            let failed = self.host.records.modify(&id, |image: &mut Image| {
                image.state = ImageState::Failed;
                image.state_reason =
                    Some("the import was interrupted: delete the image and import it again".into());
                Ok::<_, Error>(())
            });
            failed.await?;
        }
        Ok(())
    }

    /// Deletes an image, by id or name.
    ///
    /// # Errors
    ///
    /// There is none, it is being imported, or instances are made of it.
    pub async fn delete_image(&self, id: &str) -> Result<(), Error> {
        self.host
            .records
            .update(|tables, changes| {
                let image = find::image(tables, id)?;
                if image.state == ImageState::Pending {
                    return Err(Error::State {
                        kind: Kind::Image,
                        id: image.id.clone(),
                        state: "pending".into(),
                        needed: "wait until it has been imported",
                    });
                }
                let user = tables.instances.iter().find(|instance| {
                    instance.image_id == image.id && instance.state != InstanceState::Terminated
                });
                if let Some(user) = user {
                    let by = format!("instance {}", user.id);
                    return Err(Error::InUse { kind: Kind::Image, id: image.id.clone(), by });
                }
                changes.delete::<Image>(tables, &image.id);
                Ok(())
            })
            .await?;
        self.collect_blobs().await
    }

    /// Removes files that no image has any more.
    async fn collect_blobs(&self) -> Result<(), Error> {
        let (images, tables) = (self.host.images.clone(), self.host.records.read().images.clone());
        let collected = tokio::task::spawn_blocking(move || {
            // One that is being imported holds on to its files by itself.
            let manifests = tables.iter().filter_map(|image| image.manifest.as_ref());
            let referenced: HashSet<_> =
                manifests.flat_map(|manifest| manifest.blobs()).map(|blob| blob.digest).collect();
            images.blobs().collect(&referenced)
        });
        collected.await??;
        Ok(())
    }

    /// All images, in order of their names.
    pub fn images(&self) -> Vec<Arc<Image>> {
        let mut all: Vec<_> = self.host.records.read().images.iter().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}
