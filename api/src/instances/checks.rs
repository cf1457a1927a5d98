//! Looking after a running machine: does its VMM answer, does the agent in its guest, is its network up?
//!
//! One look that fails says little: a host may be busy, an agent be restarted. What has answered before is impaired
//! after [`IN_A_ROW`] looks without an answer; that is when somebody has to do something about it.

use std::time::Duration;

use pulau_agent_protocol::message::Health;
use tokio::time::{Instant, sleep, timeout};

use crate::microvm::MicroVm;
use crate::model::{Check, StatusChecks};

/// A guest's agent that has not answered by then is impaired.
const AGENT_WITHIN: Duration = Duration::from_secs(120);
/// For one look.
const LOOK_WITHIN: Duration = Duration::from_secs(10);
/// Looks without an answer after which something is impaired.
pub const IN_A_ROW: u32 = 3;

/// A machine that ran this long has not failed in a row with the one before.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// Recoveries in a row. After them somebody has to look at it.
const RECOVERIES: u32 = 3;

/// How often an instance was booted anew because it did not answer.
#[derive(Debug, Default)]
pub struct Recoveries(u32);

impl Recoveries {
    /// Whether a machine that has run for so long may be booted anew.
    pub fn may(&mut self, ran: Duration) -> bool {
        if ran >= HEALTHY_AFTER {
            self.0 = 0;
        }
        self.0 < RECOVERIES
    }

    /// One more.
    pub fn count(&mut self) {
        self.0 = self.0.saturating_add(1);
    }
}

/// What was seen of a machine.
pub struct Look {
    vmm: bool,
    health: Option<Health>,
}

/// What all looks at a machine came to so far.
#[derive(Debug, Default)]
pub struct Looks {
    looks: u32,
    /// The agent has answered in this boot: there is one.
    answered: bool,
    vmm_silent: u32,
    agent_silent: u32,
}

impl Looks {
    /// Of a machine whose agent is known to have answered, or not.
    pub fn of(answered: bool) -> Self {
        Looks { answered, ..Default::default() }
    }

    /// Takes the next look, `pause` after the one before: the first one as soon as the agent answers, at most
    /// [`AGENT_WITHIN`] after the boot. May be dropped; another one is taken then.
    pub async fn look(&self, vm: &MicroVm, since: Instant, pause: Duration) -> Look {
        let within = if self.looks == 0 {
            AGENT_WITHIN.saturating_sub(since.elapsed()).max(LOOK_WITHIN)
        } else {
            sleep(pause).await;
            LOOK_WITHIN
        };
        let health = async {
            let mut agent = vm.agent(within).await.ok()?;
            tokio::task::spawn_blocking(move || agent.health()).await.ok()?.ok()
        };
        let vmm = async { timeout(LOOK_WITHIN, vm.usage()).await.is_ok_and(|usage| usage.is_ok()) };
        let (health, vmm) = tokio::join!(timeout(within + LOOK_WITHIN, health), vmm);
        Look { vmm, health: health.ok().flatten() }
    }

    /// Takes in what was seen. What the checks are then; None leaves them as they are.
    pub fn take(&mut self, look: &Look, connected: bool) -> Option<StatusChecks> {
        self.looks = self.looks.saturating_add(1);
        let count = |silent: u32, answers: bool| if answers { 0 } else { silent.saturating_add(1) };
        self.vmm_silent = count(self.vmm_silent, look.vmm);
        self.agent_silent = count(self.agent_silent, look.health.is_some());
        let patient = |silent: u32| (1..IN_A_ROW).contains(&silent);
        if patient(self.vmm_silent) || (self.answered && patient(self.agent_silent)) {
            return None;
        }
        self.answered |= look.health.is_some();
        let check = |answers: bool| if answers { Check::Ok } else { Check::Impaired };
        let network = match &look.health {
            _ if !connected => Check::NotApplicable,
            None => Check::Unknown,
            Some(health) => check(!health.problems.iter().any(|problem| problem.contains("eth0"))),
        };
        Some(StatusChecks { vmm: check(look.vmm), agent: check(look.health.is_some()), network })
    }

    /// Why only another boot can help, if that is so. An agent that never answered may not be there at all.
    pub fn wedged(&self) -> Option<&'static str> {
        if self.vmm_silent >= IN_A_ROW {
            return Some("its VMM does not answer any more");
        }
        (self.answered && self.agent_silent >= IN_A_ROW)
            .then_some("the agent in the guest does not answer any more")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(vmm: bool, agent: bool, problem: Option<&str>) -> Look {
        let health = Health {
            id: None,
            hostname: String::new(),
            uptime_ms: 0,
            load: [0.0; 3],
            memory_total: 0,
            memory_available: 0,
            execs: 0,
            boot: Vec::new(),
            problems: problem.iter().map(ToString::to_string).collect(),
        };
        Look { vmm, health: agent.then_some(health) }
    }

    #[test]
    fn what_answered_is_impaired_only_after_several_looks() {
        let mut looks = Looks::default();
        let ok = StatusChecks { vmm: Check::Ok, agent: Check::Ok, network: Check::Ok };
        assert_eq!(looks.take(&look(true, true, None), true), Some(ok));
        assert_eq!(looks.take(&look(true, false, None), true), None);
        assert_eq!(looks.take(&look(true, false, None), true), None);
        assert_eq!(looks.take(&look(true, true, None), true), Some(ok));
        for _ in 1..IN_A_ROW {
            assert_eq!(looks.take(&look(true, false, None), true), None);
            assert!(looks.wedged().is_none());
        }
        let impaired = StatusChecks { agent: Check::Impaired, network: Check::Unknown, ..ok };
        assert_eq!(looks.take(&look(true, false, None), true), Some(impaired));
        assert!(looks.wedged().unwrap().contains("agent"));
    }

    #[test]
    fn an_agent_that_never_answered_is_impaired_and_nothing_to_recover() {
        let mut looks = Looks::default();
        for _ in 0..5 {
            let status = looks.take(&look(true, false, None), false).unwrap();
            assert_eq!(
                (status.vmm, status.agent, status.network),
                (Check::Ok, Check::Impaired, Check::NotApplicable)
            );
            assert!(looks.wedged().is_none());
        }
        for _ in 0..IN_A_ROW {
            looks.take(&look(false, false, None), false);
        }
        assert!(looks.wedged().unwrap().contains("VMM"));
    }

    #[test]
    fn what_does_not_get_better_is_left_alone_at_last() {
        let mut recoveries = Recoveries::default();
        for _ in 0..RECOVERIES {
            assert!(recoveries.may(Duration::from_secs(100)));
            recoveries.count();
        }
        assert!(!recoveries.may(Duration::from_secs(100)));
        assert!(recoveries.may(HEALTHY_AFTER), "it was well for a while");
    }

    #[test]
    fn a_network_that_could_not_be_set_up_is_impaired() {
        let status =
            Looks::default().take(&look(true, true, Some("network: interface eth0: no")), true).unwrap();
        assert_eq!((status.agent, status.network), (Check::Ok, Check::Impaired));
    }
}
