//! What commands that list, show and delete things have in common.

use serde_json::{Value, json};

use super::table::{cell, table};
use super::{print, print_json};
use crate::client::{Client, escape};

/// Titles of a table's columns, and where in each thing what goes there is (JSON pointers).
pub type Columns = [(&'static str, &'static str)];

/// Prints all there are at `path`.
pub async fn list(client: &Client, path: &str, columns: &Columns, json: bool) -> anyhow::Result<()> {
    let list: Value = client.get(path).await?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    if json { print_json(&json!({ "items": items })) } else { print(&rows(&items, columns)) }
}

/// Prints one thing: as JSON, or as a table of one row.
pub fn show(item: &Value, columns: &Columns, json: bool) -> anyhow::Result<()> {
    if json { print_json(item) } else { print(&rows(std::slice::from_ref(item), columns)) }
}

/// Deletes each of `ids` below `path`.
pub async fn delete(client: &Client, path: &str, ids: &[String]) -> anyhow::Result<()> {
    for id in ids {
        client.delete(&format!("{path}/{}", escape(id))).await?;
    }
    Ok(())
}

fn rows(items: &[Value], columns: &Columns) -> String {
    let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
    let row = |item: &Value| columns.iter().map(|(_, pointer)| cell(item, pointer)).collect();
    table(&titles, &items.iter().map(row).collect::<Vec<Vec<String>>>())
}
