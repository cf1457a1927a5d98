//! The task that drives a simulated microVM: the same requests and states as the real one's.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::agent::Door;
use super::{At, Guest, How, POWER_OFF, REBOOT, Simulation, home};
use crate::fault;
use crate::microvm::api::ApiError;
use crate::microvm::console::open_log;
use crate::microvm::ending::{Ending, Reason, StartError};
use crate::microvm::home::HomeError;
use crate::microvm::process::Exit;
use crate::microvm::request::{Action, End, Reins, Request, RequestError, State, Stop};
use crate::microvm::spec::Spec;

/// Bounds of the real driver.
const START_WITHIN: Duration = Duration::from_secs(60);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

const KILLED: Exit = Exit::Signal(libc::SIGKILL);

/// A microVM that has a driver as long as this lives.
pub(super) struct Driving {
    sim: Simulation,
    id: String,
}

impl Drop for Driving {
    fn drop(&mut self) {
        self.sim.of(&self.id, |guest| guest.driven = false);
    }
}

impl Driving {
    /// Makes a microVM, and drives it.
    fn make(sim: &Simulation, spec: Spec) -> Result<Self, HomeError> {
        let id = spec.id.clone();
        let mut world = sim.lock();
        if world.guests.contains_key(&id) {
            return Err(HomeError::Exists { id, dir: home() });
        }
        world.guests.insert(id.clone(), Guest::new(spec));
        if let Err(source) = world.keep(&id) {
            world.remove(&id);
            return Err(HomeError::Make { path: home(), source });
        }
        fault::point("vm.home");
        Ok(Driving { sim: sim.clone(), id })
    }

    /// Drives a microVM that is there.
    pub fn take(sim: &Simulation, id: &str) -> Result<Self, HomeError> {
        let mut world = sim.lock();
        match world.guests.get_mut(id) {
            None => Err(HomeError::Missing { id: id.to_owned(), dir: home() }),
            Some(guest) if guest.driven => Err(HomeError::Driven { id: id.to_owned() }),
            Some(guest) => {
                guest.driven = true;
                Ok(Driving { sim: sim.clone(), id: id.to_owned() })
            }
        }
    }

    fn of<T>(&self, look: impl FnOnce(&mut Guest) -> T) -> Option<T> {
        self.sim.of(&self.id, look)
    }

    async fn exited(&self) -> Exit {
        let Some(mut ended) = self.of(|guest| guest.ended.subscribe()) else { return KILLED };
        let exit = ended.wait_for(Option::is_some).await.map(|exit| *exit);
        exit.ok().flatten().unwrap_or(KILLED)
    }

    /// What is to go wrong now. A death later is arranged here.
    fn fault(&self, at: At) -> Option<How> {
        let how = self.sim.fault(at, &self.id)?;
        if let How::DieAfter(time) = how {
            let (sim, id) = (self.sim.clone(), self.id.clone());
            tokio::spawn(async move {
                sleep(time).await;
                sim.end(&id, KILLED);
            });
            return None;
        }
        Some(how)
    }

    /// Adds a line to the console's log, if it is kept.
    fn print(&self, line: &str) {
        let log = self.of(|guest| guest.spec.console.log.clone()).flatten();
        if let Some(Ok(mut file)) = log.map(|log| open_log(&log.path)) {
            // A simulation without a console is one all the same.
            let _ = writeln!(file, "{line}");
        }
    }

    /// Tells what there is to tell of a microVM.
    fn tell(&self, reins: &Reins) {
        let log = self.of(|guest| guest.spec.console.log.clone()).flatten();
        let mut facts = reins.facts.lock();
        facts.reach = Some(Arc::new(Door::new(&self.sim, &self.id)));
        facts.console_log = log.map(|log| log.path);
    }
}

/// Starts a microVM and drives it to its end.
pub(super) async fn create(sim: Simulation, spec: Spec, mut reins: Reins) {
    let made = spec.check().map_err(StartError::from).and_then(|()| Ok(Driving::make(&sim, spec)?));
    let driving = match made {
        Ok(driving) => driving,
        Err(error) => {
            let ending = Ending::new(Reason::NotStarted(error), None);
            reins.state.send_replace(State::Stopped(Arc::new(ending)));
            return;
        }
    };
    driving.tell(&reins);
    reins.facts.lock().spawned_at = Some(Instant::now().into_std());
    let begun = tokio::select! {
        biased;
        end = reins.told_to_end(|| Reason::NotStarted(StartError::Abandoned)) => Err(end),
        result = start(&driving) => result.map_err(|error| End::Bury(Reason::NotStarted(error))),
    };
    live(driving, begun.map(|()| State::Running), reins).await;
}

async fn start(driving: &Driving) -> Result<(), StartError> {
    let times = driving.sim.lock().times;
    sleep(times.start).await;
    match driving.fault(At::Start) {
        Some(How::Fail(message)) => return Err(refused(message).into()),
        Some(_) => {
            sleep(START_WITHIN).await;
            return Err(StartError::Silent(START_WITHIN));
        }
        None => {}
    }
    driving.of(|guest| guest.started = Some(Instant::now()));
    let _ = driving.sim.lock().keep(&driving.id);
    fault::point("vm.booting");
    driving.print("Simulated guest boots");
    Ok(())
}

/// Takes over a microVM and drives it to its end.
pub(super) async fn adopt(driving: Driving, mut reins: Reins) {
    let begun = tokio::select! {
        biased;
        end = reins.told_to_end(|| Reason::Killed) => Err(end),
        result = take_over(&driving) => result.map_err(End::Bury),
    };
    if begun.is_ok() {
        driving.tell(&reins);
    }
    live(driving, begun, reins).await;
}

async fn take_over(driving: &Driving) -> Result<State, Reason> {
    let look = driving.of(|guest| (guest.started, *guest.ended.borrow(), guest.paused));
    match look {
        None | Some((None, ..)) => return Err(Reason::NotStarted(StartError::Interrupted)),
        Some((_, Some(exit), _)) => return Err(Reason::of_exit(exit)),
        _ => {}
    }
    match driving.fault(At::Adopt) {
        Some(How::Fail(message)) => return Err(Reason::Unmanageable(refused(message))),
        Some(_) => {
            sleep(ANSWER_WITHIN).await;
            return Err(Reason::Unmanageable(timed_out()));
        }
        None => {}
    }
    Ok(if look.is_some_and(|(_, _, paused)| paused) { State::Paused } else { State::Running })
}

async fn live(driving: Driving, begun: Result<State, End>, mut reins: Reins) {
    let end = match begun {
        Ok(state) => {
            reins.state.send_replace(state);
            run(&driving, &mut reins).await
        }
        Err(end) => end,
    };
    let reason = match end {
        End::Bury(reason) => reason,
        End::LetGo => {
            drop(driving);
            reins.state.send_replace(State::Detached);
            return;
        }
    };
    reins.state.send_replace(State::Stopping);
    reins.requests.close();
    fault::point("vm.ended");
    let mut ending = Ending::new(reason, None);
    match driving.fault(At::Remove) {
        Some(How::Fail(message)) => ending.left_behind = Some(io::Error::other(message)),
        _ => driving.sim.lock().remove(&driving.id),
    }
    fault::point("vm.removed");
    // Before it is told: who hears of the end may make another of this name.
    drop(driving);
    reins.state.send_replace(State::Stopped(Arc::new(ending)));
}

async fn run(driving: &Driving, reins: &mut Reins) -> End {
    loop {
        let request = tokio::select! {
            exit = driving.exited() => return End::Bury(Reason::of_exit(exit)),
            request = reins.requests.recv() => request,
        };
        match request {
            None | Some(Request::Stop(Stop::Force)) => return End::Bury(Reason::Killed),
            Some(Request::Stop(Stop::Orderly { grace })) => {
                return stop(driving, reins, POWER_OFF, grace).await;
            }
            Some(Request::Stop(Stop::Reboot { grace })) => return stop(driving, reins, REBOOT, grace).await,
            Some(Request::Detach) => return End::LetGo,
            Some(Request::Do(action, reply)) => {
                let new = action.leads_to();
                let result = asked(driving).await.map(|()| act(driving, action));
                if let (Ok(()), Some(new)) = (&result, new) {
                    reins.state.send_replace(new);
                }
                _ = reply.send(result);
            }
            Some(Request::BalloonStatistics(reply)) => {
                let statistics =
                    asked(driving).await.map(|()| driving.of(|guest| guest.balloon_statistics()));
                _ = reply.send(statistics.map(Option::unwrap_or_default));
            }
            Some(Request::Usage(reply)) => {
                let usage = asked(driving).await.map(|()| driving.of(|guest| guest.usage()));
                _ = reply.send(usage.map(Option::unwrap_or_default));
            }
        }
    }
}

/// Whether the VMM does what it is asked to.
async fn asked(driving: &Driving) -> Result<(), RequestError> {
    match driving.fault(At::Request) {
        None => Ok(()),
        Some(How::Fail(message)) => Err(refused(message).into()),
        Some(_) => {
            let _ = timeout(ANSWER_WITHIN, driving.exited()).await;
            Err(timed_out().into())
        }
    }
}

fn act(driving: &Driving, action: Action) {
    driving.of(|guest| match action {
        Action::Pause => guest.paused = true,
        Action::Resume => guest.paused = false,
        Action::SetBalloon(mib) => guest.balloon_mib = mib,
        Action::PutMetadata(metadata) => guest.metadata = metadata,
        Action::PatchMetadata(patch) => merge(&mut guest.metadata, &patch),
        Action::CtrlAltDel => {
            guest.ended.send_if_modified(|ended| ended.replace(POWER_OFF).is_none());
        }
        Action::LimitDrive(_) | Action::LimitInterface(_) => {}
    });
}

async fn stop(driving: &Driving, reins: &mut Reins, exit: Exit, grace: Duration) -> End {
    let deadline = Instant::now() + grace;
    reins.state.send_replace(State::Stopping);
    let ignores = driving.fault(At::Stop).is_some();
    let obeys = Instant::now() + driving.sim.lock().times.stop;
    loop {
        tokio::select! {
            biased;
            exit = driving.exited() => return End::Bury(Reason::of_exit(exit)),
            () = sleep_until(obeys), if !ignores && obeys <= deadline => {
                return End::Bury(Reason::of_exit(exit));
            }
            () = sleep_until(deadline) => return End::Bury(Reason::Killed),
            request = reins.requests.recv() => match request {
                None | Some(Request::Stop(Stop::Force)) => return End::Bury(Reason::Killed),
                Some(Request::Detach) => return End::LetGo,
                Some(other) => other.refuse(),
            },
        }
    }
}

fn refused(message: String) -> ApiError {
    ApiError::Refused { status: StatusCode::BAD_REQUEST, message }
}

fn timed_out() -> ApiError {
    ApiError::TimedOut { request: "a request".into(), limit: ANSWER_WITHIN }
}

/// A JSON merge patch (RFC 7396).
fn merge(target: &mut serde_json::Value, patch: &serde_json::Value) {
    let Some(patch) = patch.as_object() else {
        target.clone_from(patch);
        return;
    };
    if !target.is_object() {
        *target = serde_json::json!({});
    }
    let Some(target) = target.as_object_mut() else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(serde_json::Value::Null), value);
        }
    }
}
