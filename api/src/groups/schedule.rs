//! Sizes by the clock, in UTC.

use std::str::FromStr as _;

use chrono::{DateTime, Utc};
use croner::Cron;

use crate::model::{Group, Schedule};

/// Why a schedule's time cannot be understood.
pub fn problem(cron: &str) -> Option<String> {
    // Seconds would be understood, too; nothing of a group is so fast.
    if cron.split_whitespace().count() != 5 {
        return Some(
            "must have five fields: minute, hour, day of the month, month, day of the week".to_owned(),
        );
    }
    match Cron::from_str(cron) {
        Err(error) => Some(error.to_string()),
        Ok(cron) => cron.find_next_occurrence(&Utc::now(), false).err().map(|error| error.to_string()),
    }
}

/// Takes over what schedules asked for since it was last looked. Of what was missed, while no daemon ran, each
/// schedule's last time counts, in the order of time.
pub fn apply(group: &mut Group, now: DateTime<Utc>) {
    let mut due: Vec<(DateTime<Utc>, Schedule)> = Vec::new();
    for schedule in &group.schedules {
        let Ok(cron) = Cron::from_str(&schedule.cron) else { continue };
        // The last one until now, if it is after the last look.
        if let Ok(at) = cron.find_previous_occurrence(&now, true)
            && at > group.schedules_until
        {
            due.push((at, schedule.clone()));
        }
    }
    if due.is_empty() {
        return;
    }
    group.schedules_until = now;
    due.sort_by_key(|(at, _)| *at);
    for (_, schedule) in due {
        let min = schedule.min_size.unwrap_or(group.min_size);
        let max = schedule.max_size.unwrap_or(group.max_size);
        // What was given alone may contradict what has changed since: the size that was asked for last wins.
        (group.min_size, group.max_size) = match schedule.max_size {
            Some(_) => (min.min(max), max),
            None => (min, max.max(min)),
        };
        let desired = schedule.desired_capacity.unwrap_or(group.desired_capacity);
        group.desired_capacity = desired.clamp(group.min_size, group.max_size);
        let size = group.desired_capacity;
        group.note(now, format!("schedule {}: the desired capacity is {size}", schedule.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_cron() {
        for good in ["0 8 * * MON-FRI", "*/5 * * * *", "30 2 1 * *", "0 0 * * 0"] {
            assert_eq!(problem(good), None, "{good}");
        }
        for bad in ["", "8", "0 8 * *", "0 0 8 * * *", "61 * * * *", "0 0 31 2 *", "@daily"] {
            assert!(problem(bad).is_some(), "{bad}");
        }
        // Sunday is 0, as in crontab(5).
        let at: DateTime<Utc> = "2026-11-25T12:00:00Z".parse().unwrap(); // A Wednesday.
        let next = Cron::from_str("0 0 * * 0").unwrap().find_next_occurrence(&at, false).unwrap();
        assert_eq!(next.to_rfc3339(), "2026-11-29T00:00:00+00:00");
    }
}
