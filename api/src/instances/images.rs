//! Images: imported in the background, deleted when nothing is made of them.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::jobs::Work;
use super::{Service, failure, find, idempotency};
use crate::fault;
use crate::image::{Credentials, DiskImport, Manifest, OciImport, OciSource, Reference};
use crate::model::{
    Image, ImageSource, ImageState, InstanceState, Kind, StateReason, check_name, check_tags, id,
};
use crate::records::{Changes, Tables};

/// A request to import an image: of `root`, `container_file` or `reference`, one of them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    pub name: String,
    #[serde(default)]
    pub description: String,
    /// Absolute path of a root file system or disk image: EROFS, ext4, a raw disk with partitions, or qcow2.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub root: Option<PathBuf>,
    /// Absolute path of a container image: an OCI layout, an archive of one, or what `docker save` wrote.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub container_file: Option<PathBuf>,
    /// Which image of several in `container_file`: its tag or name.
    #[serde(default)]
    pub tag: Option<String>,
    /// A container image in a registry, such as `debian:12` or `ghcr.io/org/app:1.2`.
    #[serde(default)]
    pub reference: Option<String>,
    /// For the registry.
    #[serde(default)]
    pub username: Option<String>,
    /// For the registry. Kept nowhere.
    #[serde(default, skip_serializing)]
    #[schema(write_only)]
    pub password: Option<String>,
    /// Absolute path of the kernel. If absent it is found in the root file system; container images have none.
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

/// What is to be imported, understood.
enum Import {
    Disk(DiskImport),
    Oci(OciImport),
}

impl ImportImage {
    fn understand(&self, agent: Option<&PathBuf>) -> Result<(Import, ImageSource), Error> {
        let paths = [
            ("root", &self.root),
            ("container_file", &self.container_file),
            ("kernel", &self.kernel),
            ("initrd", &self.initrd),
        ];
        for (field, path) in paths {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(Error::invalid(field, "must be an absolute path on the host"));
            }
        }
        if self.tag.is_some() && self.container_file.is_none() {
            return Err(Error::invalid("tag", "picks an image of a container_file"));
        }
        if (self.username.is_some() || self.password.is_some()) && self.reference.is_none() {
            return Err(Error::invalid("username", "is for a registry"));
        }
        let (source, origin) = match (&self.root, &self.container_file, &self.reference) {
            (Some(root), None, None) => {
                let source = ImageSource::File { path: root.display().to_string() };
                let import = DiskImport {
                    root: root.clone(),
                    kernel: self.kernel.clone(),
                    initrd: self.initrd.clone(),
                    boot_args: self.boot_args.clone(),
                };
                return Ok((Import::Disk(import), source));
            }
            (None, Some(path), None) => {
                let source = OciSource::Local { path: path.clone(), tag: self.tag.clone() };
                (source, ImageSource::ContainerFile { path: path.display().to_string() })
            }
            (None, None, Some(text)) => {
                let reference: Reference =
                    text.parse().map_err(|error| Error::invalid("reference", error))?;
                let credentials = match (&self.username, &self.password) {
                    (Some(user), Some(password)) => {
                        Some(Credentials { user: user.clone(), password: password.clone() })
                    }
                    (None, None) => None,
                    _ => return Err(Error::invalid("password", "goes with a username")),
                };
                let source = OciSource::Registry { reference, credentials };
                (source, ImageSource::Registry { reference: text.clone() })
            }
            _ => {
                let problem = "give one of root, container_file and reference";
                return Err(Error::invalid("root", problem));
            }
        };
        let kernel = self.kernel.clone();
        let kernel =
            kernel.ok_or_else(|| Error::invalid("kernel", "must be given: a container image has none"))?;
        let agent = agent.cloned().ok_or_else(|| {
            Error::NotPermitted(
                "container images need pulau-agent, which this host does not have: put it beside pulau, or name it in \
                 PULAU_AGENT, and start the daemon again"
                    .into(),
            )
        })?;
        let (initrd, boot_args) = (self.initrd.clone(), self.boot_args.clone());
        Ok((Import::Oci(OciImport { source, agent, kernel, initrd, boot_args }), origin))
    }
}

impl Service {
    /// Begins to import an image, which is `pending` until that has been done.
    ///
    /// # Errors
    ///
    /// There is one of this name, a path is not absolute, or it is not clear what to import.
    pub async fn import_image(&self, request: ImportImage) -> Result<Arc<Image>, Error> {
        check_name(&request.name)?;
        check_tags(&request.tags)?;
        let (import, source) = request.understand(self.host.agent.as_ref())?;
        let (name, description) = (request.name.clone(), request.description.clone());
        let image = self.pending_image(name, description, request.tags.clone(), source);
        let token = request.client_token.as_deref();
        let images = self.host.images.clone();
        self.begin_image(
            image,
            "import-image",
            token,
            &request,
            |_, _| Ok(()),
            |work| async move {
                let imported = match import {
                    Import::Disk(import) => images.import_disk(import, &work.task).await,
                    Import::Oci(import) => images.import_oci(import, &work.task).await,
                };
                Ok(imported?)
            },
        )
        .await
    }

    /// The record of an image that is about to be made.
    pub(super) fn pending_image(
        &self,
        name: String,
        description: String,
        tags: BTreeMap<String, String>,
        source: ImageSource,
    ) -> Image {
        Image {
            id: id::new(id::IMAGE),
            name,
            description,
            state: ImageState::Pending,
            state_reason: None,
            state_code: None,
            progress: None,
            source: Some(source),
            created: self.host.now(),
            size: 0,
            manifest: None,
            tags,
        }
    }

    /// Writes down that an image is to be made, and has `make` do it. The image that the same request made before, if
    /// it did.
    pub(super) async fn begin_image<F>(
        &self,
        image: Image,
        operation: &'static str,
        token: Option<&str>,
        request: &impl Serialize,
        mut check: impl FnMut(&Tables, &mut Changes) -> Result<(), Error>,
        make: impl FnOnce(Arc<Work>) -> F + Send + 'static,
    ) -> Result<Arc<Image>, Error>
    where
        F: Future<Output = Result<Manifest, Error>> + Send + 'static,
    {
        let id = self.host.records.update(|tables, changes| {
            let known = idempotency::find(tables, operation, token, request)?;
            if let Some(id) = known.and_then(|made| made.into_iter().next()) {
                return Ok(id);
            }
            if tables.images.iter().any(|known| known.name == image.name) {
                return Err(Error::Exists { kind: Kind::Image, name: image.name.clone() });
            }
            check(tables, changes)?;
            changes.create(&image);
            idempotency::remember(&self.host, changes, operation, token, request, vec![image.id.clone()]);
            Ok(image.id.clone())
        });
        let id = id.await?;
        if id == image.id {
            let (service, mut make) = (self.clone(), Some(make));
            let own = id.clone();
            self.jobs.run(&id, move |work| {
                let (service, id, work) = (service.clone(), own.clone(), Arc::new(work));
                let making = make.take()?(work.clone());
                Some(async move { service.make_image(&id, &work, making).await })
            });
        }
        find::image(&self.host.records.read(), &id)
    }

    async fn make_image(&self, id: &str, work: &Work, making: impl Future<Output = Result<Manifest, Error>>) {
        let note = |image: &mut Image, progress| {
            if image.state == ImageState::Pending {
                image.progress = Some(progress);
            }
        };
        let result = work.noted(&self.host, id, note, making).await;
        fault::point("image.made");
        let finished = self.host.records.modify(id, |image: &mut Image| {
            image.progress = None;
            match &result {
                Ok(manifest) => {
                    image.state = ImageState::Available;
                    image.size = manifest.size();
                    image.manifest = Some(manifest.clone());
                }
                Err(error) => fail(image, failure::reason(error)),
            }
            Ok::<_, Error>(())
        });
        match (finished.await, &result) {
            (Ok(None), _) => tracing::info!(image = id, "was deleted before it was made"),
            (Ok(Some(_)), Ok(_)) => tracing::info!(image = id, "was made"),
            (Ok(Some(_)), Err(error)) => tracing::warn!(image = id, "could not be made: {error}"),
            (Err(error), _) => tracing::error!(image = id, "its end cannot be written down: {error}"),
        }
    }

    /// Images that a daemon did not live to make have failed.
    pub(super) async fn fail_interrupted_imports(&self) -> Result<(), Error> {
        let pending: Vec<String> = {
            let tables = self.host.records.read();
            let pending = tables.images.iter().filter(|image| image.state == ImageState::Pending);
            pending.map(|image| image.id.clone()).collect()
        };
        for id in pending {
            let failed = self.host.records.modify(&id, |image: &mut Image| {
                let message = "the daemon ended while it was made: delete the image and make it again".into();
                fail(image, StateReason { code: "Server.Interrupted".into(), message });
                Ok::<_, Error>(())
            });
            failed.await?;
        }
        Ok(())
    }

    /// Deletes an image, by id or name. One that is being made is given up.
    ///
    /// # Errors
    ///
    /// There is none, or instances are made of it.
    pub async fn delete_image(&self, id: &str) -> Result<(), Error> {
        let deleted = self.host.records.update(|tables, changes| {
            let image = find::image(tables, id)?;
            let user = tables.instances.iter().find(|instance| {
                instance.image_id == image.id && instance.state != InstanceState::Terminated
            });
            if let Some(user) = user {
                let by = format!("instance {}", user.id);
                return Err(Error::InUse { kind: Kind::Image, id: image.id.clone(), by });
            }
            if let Some(copy) = tables.images.iter().find(|copy| is_made_of(tables, copy, &image.id)) {
                let by = format!("image {}, which is being made of an instance of it", copy.id);
                return Err(Error::InUse { kind: Kind::Image, id: image.id.clone(), by });
            }
            changes.delete::<Image>(tables, &image.id);
            Ok::<_, Error>(image.id.clone())
        });
        let id = deleted.await?;
        fault::point("image.deleted");
        self.jobs.cancel(&id);
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

/// Whether an image is being made that will have files of image `id`.
fn is_made_of(tables: &Tables, image: &Image, id: &str) -> bool {
    let Some(ImageSource::Instance { instance_id }) = &image.source else { return false };
    let of = tables.instances.get(instance_id).is_some_and(|instance| instance.image_id == id);
    of && image.state == ImageState::Pending
}

fn fail(image: &mut Image, why: StateReason) {
    image.state = ImageState::Failed;
    image.progress = None;
    image.state_code = Some(why.code);
    image.state_reason = Some(why.message);
}
