//! Tables for people.

use serde_json::Value;

/// Lays out rows under a heading, columns as wide as they need to be.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = heading.iter().map(|&title| title.to_owned()).collect();
    let width = |column: usize| {
        let cells = std::iter::once(&heading).chain(rows).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A field of a JSON object for a cell; empty if it is not there.
pub fn cell(object: &Value, pointer: &str) -> String {
    match object.pointer(pointer) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.chars().filter(|c| !c.is_control()).collect(),
        Some(Value::Array(items)) => {
            let texts =
                items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned));
            texts.collect::<Vec<_>>().join(",")
        }
        Some(other) => other.to_string(),
    }
}

/// A number of bytes for people, in GiB.
pub fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib.fract() == 0.0 { format!("{gib} GiB") } else { format!("{gib:.2} GiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["i-1".to_owned(), "running".to_owned()], vec!["i-22".to_owned(), String::new()]];
        assert_eq!(table(&["ID", "STATE"], &rows), "ID    STATE\ni-1   running\ni-22\n");
    }

    #[test]
    fn cells_are_plain_text() {
        let object = serde_json::json!({"a": {"b": "x\u{1b}[0m"}, "n": 3, "l": ["p", "q"], "z": null});
        let cells = ["/a/b", "/n", "/l", "/z", "/y"].map(|pointer| cell(&object, pointer));
        assert_eq!(cells, ["x[0m", "3", "p,q", "", ""]);
    }
}
