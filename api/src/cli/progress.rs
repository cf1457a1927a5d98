//! Waiting for what is made in the background: images, volumes, snapshots.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::bail;
use serde_json::Value;

use super::table::cell;
use crate::client::{Client, Refused};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const BAR: usize = 24;

/// Waits until the thing at `path` is no longer in state `meanwhile`, with its progress on standard error if that is a
/// terminal. None if it is gone then.
///
/// # Errors
///
/// It comes to a state of failure: the message says why.
pub async fn settled(
    client: &Client,
    path: &str,
    mut item: Value,
    meanwhile: &str,
) -> anyhow::Result<Option<Value>> {
    let mut shown = Line { on: std::io::stderr().is_terminal(), width: 0 };
    while item["state"] == meanwhile {
        shown.put(&bar(&item["progress"]));
        tokio::time::sleep(LOOK_EVERY).await;
        item = match client.get(path).await {
            Ok(item) => item,
            Err(error) if error.downcast_ref::<Refused>().is_some_and(|refused| refused.status == 404) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
    }
    shown.put("");
    if item["state"] == "failed" || item["state"] == "error" {
        let why = [cell(&item, "/state_reason/message"), cell(&item, "/state_reason")];
        let code = [cell(&item, "/state_code"), cell(&item, "/state_reason/code")];
        let first = |texts: [String; 2]| texts.into_iter().find(|text| !text.is_empty()).unwrap_or_default();
        bail!("{} could not be made: {} ({})", cell(&item, "/id"), first(why), first(code));
    }
    Ok(Some(item))
}

/// A line that is written over.
struct Line {
    on: bool,
    width: usize,
}

impl Line {
    fn put(&mut self, text: &str) {
        if !self.on || (text.is_empty() && self.width == 0) {
            return;
        }
        let width = self.width;
        self.width = text.chars().count();
        // A terminal that is gone misses nothing.
        let _ = write!(std::io::stderr(), "\r{text:width$}{}", if text.is_empty() { "\r" } else { "" });
        let _ = std::io::stderr().flush();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.put("");
    }
}

/// `download  [########----------------]  33 %  of 120.5 MiB`
fn bar(progress: &Value) -> String {
    let phase = cell(progress, "/phase");
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let Some(done) = progress["done"].as_u64() else { return phase };
    let Some(total) = progress["total"].as_u64().filter(|total| *total > 0) else {
        return format!("{phase:9} {:.1} MiB", mib(done));
    };
    let share = (done as f64 / total as f64).clamp(0.0, 1.0);
    let full = (share * BAR as f64) as usize;
    let bar = format!("{}{}", "#".repeat(full), "-".repeat(BAR.saturating_sub(full)));
    format!("{phase:9} [{bar}] {:3.0} % of {:.1} MiB", share * 100.0, mib(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_bar_where_its_end_is_known() {
        let of = |json: &str| bar(&serde_json::from_str(json).unwrap());
        assert_eq!(of("null"), "");
        assert_eq!(of(r#"{"phase":"download","done":3145728,"total":null}"#), "download  3.0 MiB");
        assert_eq!(
            of(r#"{"phase":"layers","done":5242880,"total":10485760}"#),
            "layers    [############------------]  50 % of 10.0 MiB"
        );
        assert_eq!(
            of(r#"{"phase":"copy","done":9,"total":3}"#),
            "copy      [########################] 100 % of 0.0 MiB"
        );
    }
}
