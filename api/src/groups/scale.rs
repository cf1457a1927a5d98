//! How many members a group's CPU usage asks for.
//!
//! Usage is what the host counts for each microVM, guest and VMM together, as a share of its vCPUs; of the
//! members in service the mean, over the last three samples. More is launched as soon as it is above the target;
//! less is wanted only below nine tenths of it, so that a group does not swing. Either happens only after the
//! cool-down since the last change, and while no member is on its way.

use std::collections::{HashMap, VecDeque};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;

use crate::instances::Service;
use crate::model::{Group, MemberState};

/// Samples of which the mean is taken.
const WINDOW: usize = 3;

/// Usage of one group's members.
#[derive(Debug, Default)]
pub struct Load {
    /// CPU time in microseconds of each instance, and when it was that.
    last: HashMap<String, (Instant, u64)>,
    /// Percent.
    means: VecDeque<f64>,
}

impl Load {
    /// Asks the members in service what they have used.
    pub async fn sample(&mut self, instances: &Service, group: &Group) {
        let in_service = group.members.iter().filter(|member| member.state == MemberState::InService);
        let ids: Vec<String> = in_service.filter_map(|member| member.instance_id.clone()).collect();
        let mut last = HashMap::new();
        let mut percents = Vec::new();
        for id in ids {
            let Ok(machine) = instances.machine(&id) else { continue };
            let Ok(usage) = machine.usage().await else { continue };
            let (at, vcpus) = (Instant::now(), instances.get(&id).map_or(1, |instance| instance.size.vcpus));
            if let Some((before, used)) = self.last.get(&id) {
                let elapsed = at.duration_since(*before).as_micros() as f64 * f64::from(vcpus);
                if elapsed > 0.0 {
                    percents.push(usage.cpu_time_us.saturating_sub(*used) as f64 / elapsed * 100.0);
                }
            }
            last.insert(id, (at, usage.cpu_time_us));
        }
        self.last = last;
        if percents.is_empty() {
            return;
        }
        if self.means.len() == WINDOW {
            self.means.pop_front();
        }
        self.means.push_back(percents.iter().sum::<f64>() / percents.len() as f64);
    }

    /// The mean, once there are enough samples.
    pub fn percent(&self) -> Option<f64> {
        (self.means.len() == WINDOW).then(|| self.means.iter().sum::<f64>() / WINDOW as f64)
    }

    /// What was before a change does not count for the next.
    pub fn forget(&mut self) {
        self.means.clear();
    }
}

/// The capacity to have at this usage; None if it is to stay.
pub fn wanted(group: &Group, percent: f64, now: DateTime<Utc>) -> Option<u32> {
    let policy = group.scaling.as_ref()?;
    let quiet = !group.paused && group.deletion.is_none() && group.rolling().is_none();
    let all_in_service = group.members.len() == group.target() as usize
        && group.members.iter().all(|member| member.state == MemberState::InService);
    let cooldown = TimeDelta::try_seconds(policy.cooldown_seconds.min(1 << 31).cast_signed())?;
    let cooled = group.last_scaled.is_none_or(|last| now - last >= cooldown);
    if !quiet || !all_in_service || !cooled || !percent.is_finite() {
        return None;
    }
    let (target, current) = (f64::from(policy.cpu_percent), group.target());
    let needed = (f64::from(current) * percent / target).ceil().clamp(0.0, f64::from(u32::MAX)) as u32;
    let wanted = if percent > target {
        needed.max(current.saturating_add(1))
    } else if percent < target * 0.9 {
        needed.max(1).min(current)
    } else {
        current
    };
    let wanted = wanted.clamp(group.min_size, group.max_size);
    (wanted != current).then_some(wanted)
}
