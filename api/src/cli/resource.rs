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
    show_all(&list["items"].as_array().cloned().unwrap_or_default(), columns, json)
}

/// Prints many things: as JSON, or as a table.
pub fn show_all(items: &[Value], columns: &Columns, json: bool) -> anyhow::Result<()> {
    if json { print_json(&json!({ "items": items })) } else { print(&rows(items, columns)) }
}

/// All there are at `path` that fit a filter, from all its pages.
pub async fn all(client: &Client, path: &str, filter: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let filter = filter.map(|filter| format!("&filter={}", escape(filter))).unwrap_or_default();
    let (mut all, mut next) = (Vec::new(), String::new());
    loop {
        let page: Value = client.get(&format!("{path}?next_token={next}{filter}")).await?;
        all.extend(page["items"].as_array().cloned().unwrap_or_default());
        match page["next_token"].as_str() {
            Some(token) => next = escape(token),
            None => return Ok(all),
        }
    }
}

/// A tag of the command line: `KEY=VALUE`.
pub fn tag(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE"),
    }
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

/// A table of things, a row each.
pub fn rows(items: &[Value], columns: &Columns) -> String {
    let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
    let row = |item: &Value| columns.iter().map(|(_, pointer)| cell(item, pointer)).collect();
    table(&titles, &items.iter().map(row).collect::<Vec<Vec<String>>>())
}
