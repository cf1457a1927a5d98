//! Images of what instances have become: the image's kernel, and a copy of the instance's root disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::jobs::Work;
use super::snapshots::{check_copyable, check_description};
use super::{Service, find};
use crate::image::Manifest;
use crate::model::{Image, ImageSource, Instance, check_name, check_tags};

/// A request to make an image of an instance.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateImage {
    pub name: String,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// Makes the request safe to send again, with the same answer.
    #[serde(default)]
    pub client_token: Option<String>,
}

impl Service {
    /// Begins to make an image of an instance that is stopped, or running: that is paused while its root disk is
    /// copied. Other volumes are not in the image.
    ///
    /// # Errors
    ///
    /// There is no such instance, it is in another state, or there is an image of this name.
    pub async fn create_image(&self, instance: &str, request: CreateImage) -> Result<Arc<Image>, Error> {
        check_name(&request.name)?;
        check_tags(&request.tags)?;
        check_description(&request.description)?;
        self.host.volumes.check_room()?;
        let source = ImageSource::Instance { instance_id: instance.to_owned() };
        let (service, own) = (self.clone(), instance.to_owned());
        let CreateImage { name, description, tags, client_token } = request.clone();
        let image = self.pending_image(name, description, tags, source);
        let check = |tables: &crate::records::Tables, changes: &mut crate::records::Changes| {
            check_copyable(tables, instance)?;
            // It stays in this state until the image is written down, and so known to use its image's files.
            changes.expect_unchanged::<Instance>(tables, instance);
            Ok(())
        };
        let request = (instance, &request);
        self.begin_image(image, "create-image", client_token.as_deref(), &request, check, |work| async move {
            service.freeze(&own, &work).await
        })
        .await
    }

    async fn freeze(&self, id: &str, work: &Work) -> Result<Manifest, Error> {
        let (from, volume) = {
            let tables = self.host.records.read();
            let instance = find::instance(&tables, id)?;
            let image = find::image(&tables, &instance.image_id)?;
            let manifest = image.manifest.clone();
            let manifest =
                manifest.ok_or_else(|| Error::Internal(format!("image {} has no manifest", image.id)))?;
            (manifest, instance.root_volume.clone())
        };
        let disk = self.host.volumes.path(&volume)?;
        let held = self.hold(id).await?;
        let copied = match work.task.check() {
            Ok(()) => self.host.images.copy_disk(disk, &work.task).await,
            Err(given_up) => Err(given_up.into()),
        };
        // The rest takes longer, and can be done while the guest goes on.
        held.release().await;
        Ok(self.host.images.freeze(from, copied?, &work.task).await?)
    }
}
