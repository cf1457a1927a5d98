//! Instances for people.

use serde_json::Value;

use crate::cli::table::{cell, table};

pub fn summary(instances: &[Value]) -> String {
    let rows: Vec<Vec<String>> = instances
        .iter()
        .map(|instance| {
            ["/id", "/tags/Name", "/state", "/instance_type", "/interface/private_address", "/image_id"]
                .map(|pointer| cell(instance, pointer))
                .into()
        })
        .collect();
    table(&["ID", "NAME", "STATE", "TYPE", "ADDRESS", "IMAGE"], &rows)
}

pub fn types(types: &[Value]) -> String {
    let row = |item: &Value| ["/name", "/vcpus", "/memory_mib"].map(|pointer| cell(item, pointer)).into();
    table(&["NAME", "VCPUS", "MEMORY (MIB)"], &types.iter().map(row).collect::<Vec<_>>())
}

/// Every field on a line of its own.
pub fn details(instance: &Value) -> String {
    let mut rows = Vec::new();
    flatten("", instance, &mut rows);
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.into_iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(&name, value, rows);
            }
        }
        value => rows.push((prefix.to_owned(), cell(value, ""))),
    }
}
