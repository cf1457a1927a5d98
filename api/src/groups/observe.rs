//! What is seen of a group's members: their instances, and what load balancers say of them.

use std::collections::BTreeMap;

use super::plan::{Health, Seen};
use crate::model::{
    Check, Group, HealthCheckType, Instance, InstanceState, LoadBalancer, MemberState, TargetState,
};
use crate::records::Tables;

pub fn observe(tables: &Tables, group: &Group) -> BTreeMap<u64, Seen> {
    let balancers: Vec<&LoadBalancer> = tables
        .load_balancers
        .iter()
        .map(|balancer| &**balancer)
        .filter(|balancer| balancer.group_id.as_deref() == Some(group.id.as_str()))
        .collect();
    let seen = |member: &crate::model::Member| {
        let Some(id) = &member.instance_id else { return Seen { health: Health::Unknown, drained: true } };
        let health = match tables.instances.get(id) {
            None => Health::Gone,
            Some(instance) => match by_instance(instance) {
                Health::Healthy if group.health_check_type == HealthCheckType::LoadBalancer => {
                    by_balancers(id, &balancers)
                }
                other => other,
            },
        };
        let leads =
            |balancer: &&LoadBalancer| balancer.targets.iter().any(|target| target.instance_id == *id);
        let drained = member.state != MemberState::InService && !balancers.iter().any(leads);
        Seen { health, drained }
    };
    group.members.iter().map(|member| (member.slot, seen(member))).collect()
}

/// EC2's status checks. What is not known yet is not bad.
fn by_instance(instance: &Instance) -> Health {
    let state = instance.state;
    match state {
        InstanceState::Terminated => return Health::Gone,
        InstanceState::Stopping | InstanceState::Stopped | InstanceState::ShuttingDown => {
            let why = instance.state_reason.as_ref().map(|why| why.message.as_str()).unwrap_or("of itself");
            return Health::Ended(format!("its instance is {}: {why}", state.name()));
        }
        InstanceState::Pending => return Health::Starting,
        InstanceState::Running => {}
    }
    let status = instance.status;
    let checks = [("vmm", status.vmm), ("agent", status.agent), ("network", status.network)];
    if let Some((name, _)) = checks.iter().find(|(_, check)| *check == Check::Impaired) {
        let why = instance.state_reason.as_ref().map(|why| format!(": {}", why.message)).unwrap_or_default();
        return Health::Unhealthy(format!("its status check {name} is impaired{why}"));
    }
    if status.agent == Check::Ok { Health::Healthy } else { Health::Starting }
}

fn by_balancers(id: &str, balancers: &[&LoadBalancer]) -> Health {
    let mut health = Health::Healthy;
    for balancer in balancers {
        let target = balancer.targets.iter().find(|target| target.instance_id == id);
        match target.map(|target| target.state) {
            Some(TargetState::Healthy) => {}
            Some(TargetState::Unhealthy) => {
                let why = target.and_then(|target| target.reason.as_deref()).unwrap_or("it does not answer");
                return Health::Unhealthy(format!("load balancer {}: {why}", balancer.name));
            }
            None | Some(TargetState::Initial | TargetState::Draining) => health = Health::Starting,
        }
    }
    health
}
