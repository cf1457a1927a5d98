//! Seeing a request through: a few instances at once, each by asking its guest where it is.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::guest::{Look, Progress, Verb, command};
use crate::instances::{Error, Service};
use crate::model::{Check, Instance, InstancePatch, InstanceState, Patch, PatchState};

/// Guests updated at once: they load the same mirror, and may be the members of one service.
const AT_ONCE: usize = 4;
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// For one request to a guest.
const ASK_WITHIN: Duration = Duration::from_secs(30);
/// Beyond its own time a guest gets so long to say how it ended.
const GRACE: Duration = Duration::from_secs(90);
/// For a reboot, until the agent answers.
const REBOOT_WITHIN: Duration = Duration::from_secs(600);

/// How the update of an instance ended.
enum End {
    Succeeded,
    Failed(String),
    Cancelled,
}

/// Sees a request through to its end.
pub async fn see_through(service: Service, id: String) {
    let Ok(patch) = service.patch(&id) else { return };
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for entry in patch.instances.iter().filter(|entry| !entry.state.is_final()) {
        let (service, patch) = (service.clone(), id.clone());
        let (instance, places) = (entry.instance_id.clone(), places.clone());
        tasks.spawn(async move {
            // Never closed.
            let _place = places.acquire().await;
            let of_one = OfOne { service, patch, instance };
            if let Err(error) = of_one.drive().await {
                tracing::error!(
                    patch = of_one.patch,
                    instance = of_one.instance,
                    "cannot be written down: {error}"
                );
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    let now = service.host.now();
    let finished = service.host.records.modify(&id, |patch: &mut Patch| {
        let any = |state| patch.instances.iter().any(|entry| entry.state == state);
        patch.state = if any(PatchState::Failed) {
            PatchState::Failed
        } else if any(PatchState::Cancelled) {
            PatchState::Cancelled
        } else {
            PatchState::Succeeded
        };
        patch.finished = Some(now);
        Ok::<_, Error>(())
    });
    if let Err(error) = finished.await {
        tracing::error!(patch = id, "its end cannot be written down: {error}");
    }
}

/// The update of one instance.
struct OfOne {
    service: Service,
    patch: String,
    instance: String,
}

impl OfOne {
    async fn drive(&self) -> Result<(), Error> {
        let end = self.update().await?;
        let now = self.service.host.now();
        self.note(|entry| {
            (entry.state, entry.message) = match &end {
                End::Succeeded => (PatchState::Succeeded, None),
                End::Failed(why) => (PatchState::Failed, Some(why.clone())),
                End::Cancelled => (PatchState::Cancelled, None),
            };
            entry.finished = Some(now);
        })
        .await
    }

    /// Errors are of the records; what fails otherwise is an end.
    async fn update(&self) -> Result<End, Error> {
        let Some((patch, mut entry)) = self.entry() else { return Ok(End::Cancelled) };
        if entry.state == PatchState::Pending {
            if patch.cancel {
                return Ok(End::Cancelled);
            }
            let Ok(instance) = self.service.get(&self.instance) else { return Ok(failed("it is gone")) };
            let (now, generation) = (self.service.host.now(), instance.generation);
            self.note(|entry| {
                (entry.state, entry.started, entry.generation) = (PatchState::Running, Some(now), generation);
            })
            .await?;
            entry.generation = generation;
        }
        if entry.state != PatchState::Rebooting {
            let within = Duration::from_secs(patch.timeout_seconds);
            match self.install(entry.generation, within).await? {
                Ok(reboot) if reboot && patch.reboot => {
                    self.note(|entry| entry.state = PatchState::Rebooting).await?;
                }
                Ok(_) => return Ok(End::Succeeded),
                Err(end) => return Ok(end),
            }
        }
        self.reboot(entry.generation).await
    }

    /// Has the guest install what there is, and follows that. Whether a reboot is needed then.
    async fn install(&self, generation: u64, within: Duration) -> Result<Result<bool, End>, Error> {
        // Begun again by a later daemon, it gets its time anew: the guest keeps to its own.
        let deadline = Instant::now() + within + GRACE;
        match self.ask(Verb::Start { within }).await {
            Ok(text) if text.trim() == "unsupported" => {
                let why =
                    "its image has no package manager that is known here: apt-get is needed, and setsid";
                return Ok(Err(failed(why)));
            }
            Ok(_) => {}
            Err(error) => return Ok(Err(failed(error.to_string()))),
        }
        let mut told_to_stop = false;
        loop {
            if let Err(why) = self.still_runs(generation) {
                return Ok(Err(failed(why)));
            }
            let cancel = self.entry().is_some_and(|(patch, _)| patch.cancel);
            if cancel && !told_to_stop {
                // It may have ended this moment; the next look tells.
                told_to_stop = self.ask(Verb::Cancel).await.is_ok();
            }
            match self.ask(Verb::Look).await.map(|text| Look::parse(&text)) {
                Ok(look) if look.progress == Progress::Done => return self.done(look, told_to_stop).await,
                Ok(look) if look.progress == Progress::Running => {
                    let line = look.last_line();
                    self.note(|entry| entry.message.clone_from(&line)).await?;
                }
                Ok(_) => return Ok(Err(failed("the guest knows nothing of it any more"))),
                // An agent that is restarted, for one, by its own package.
                Err(error) => tracing::debug!(instance = self.instance, "no look at its update: {error}"),
            }
            if Instant::now() >= deadline {
                return Ok(Err(failed("the guest did not say in time how it ended")));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn done(&self, look: Look, cancelled: bool) -> Result<Result<bool, End>, Error> {
        let (code, reboot) = (look.exit_code, look.reboot_required);
        self.note(|entry| {
            entry.exit_code = Some(code);
            entry.reboot_required = Some(reboot);
            entry.packages.clone_from(&look.packages);
            entry.output.clone_from(&look.output);
        })
        .await?;
        Ok(match code {
            0 => Ok(reboot),
            _ if cancelled => Err(End::Cancelled),
            124 => Err(failed("it took too long and was stopped")),
            code => Err(failed(format!("the package manager failed with exit code {code}: see its output"))),
        })
    }

    /// Boots the instance anew, unless that was done, and waits for its agent.
    async fn reboot(&self, generation: u64) -> Result<End, Error> {
        let of_now = |service: &Service| service.get(&self.instance).map(|instance| instance.generation);
        if of_now(&self.service).is_ok_and(|now| now == generation)
            && let Err(error) = self.service.reboot(&self.instance).await
        {
            return Ok(failed(error.to_string()));
        }
        let deadline = Instant::now() + REBOOT_WITHIN;
        loop {
            match self.service.get(&self.instance) {
                Ok(now) if is_back(&now, generation) => {
                    self.note(|entry| entry.rebooted = true).await?;
                    return Ok(End::Succeeded);
                }
                Ok(now) if now.desired == crate::model::Desired::Running && Instant::now() < deadline => {}
                _ => {
                    return Ok(failed("the packages are in place, but it did not come back from its reboot"));
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn ask(&self, verb: Verb) -> Result<String, Error> {
        let argv = command(verb, &self.patch);
        let (output, _) = self.service.exec(&self.instance, argv, String::new(), None, ASK_WITHIN).await?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::Guest {
            id: self.instance.clone(),
            problem: format!("its update cannot be begun or asked for: {said}"),
        })
    }

    fn still_runs(&self, generation: u64) -> Result<(), String> {
        match self.service.get(&self.instance) {
            Ok(now) if now.generation != generation => Err("it was booted anew meanwhile".into()),
            Ok(now) if now.state != InstanceState::Running => Err(format!("it is {}", now.state.name())),
            Ok(_) => Ok(()),
            Err(_) => Err("it is gone".into()),
        }
    }

    fn entry(&self) -> Option<(Arc<Patch>, InstancePatch)> {
        let patch = self.service.patch(&self.patch).ok()?;
        let entry = patch.instances.iter().find(|entry| entry.instance_id == self.instance)?.clone();
        Some((patch, entry))
    }

    async fn note(&self, change: impl Fn(&mut InstancePatch)) -> Result<(), Error> {
        let modified = self.service.host.records.modify(&self.patch, |patch: &mut Patch| {
            patch.instances.iter_mut().filter(|entry| entry.instance_id == self.instance).for_each(&change);
            Ok::<_, Error>(())
        });
        modified.await.map(drop)
    }
}

fn is_back(instance: &Instance, generation: u64) -> bool {
    instance.generation != generation && instance.status.agent == Check::Ok
}

fn failed(why: impl Into<String>) -> End {
    End::Failed(why.into())
}
