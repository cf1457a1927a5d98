//! The result of an examination, as a table for people and as JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

use super::{Check, Finding, State};

/// All findings of one examination. Serialises to
/// `{"ok": bool, "checks": [{"name", "title", "state", "detail", "remedy"}]}`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// True if nothing is [`State::Missing`].
    pub ok: bool,
    pub checks: Vec<Line>,
}

/// One check and its finding.
#[derive(Debug, Serialize)]
pub struct Line {
    pub name: &'static str,
    pub title: &'static str,
    pub state: State,
    pub detail: String,
    /// Null if there is nothing to do.
    pub remedy: Option<String>,
}

impl Report {
    pub(super) fn new(findings: impl Iterator<Item = (Check, Finding)>) -> Self {
        let line = |(check, finding): (Check, Finding)| Line {
            name: check.name,
            title: check.title,
            state: finding.state,
            detail: finding.detail,
            remedy: finding.remedy,
        };
        let checks: Vec<_> = findings.map(line).collect();
        Report { ok: checks.iter().all(|line| line.state != State::Missing), checks }
    }

    /// The report as lines of text, remedies below what they mend, with a summary at the end.
    pub fn table(&self, colour: bool) -> String {
        let mut text = String::new();
        let width = self.checks.iter().map(|line| line.name.len()).max().unwrap_or(0);
        for line in &self.checks {
            let (word, code) = match line.state {
                State::Ok => ("ok", "32"),
                State::Degraded => ("degraded", "33"),
                State::Missing => ("missing", "31"),
            };
            let state = format!("{word:<8}");
            let state = if colour { format!("\x1b[{code}m{state}\x1b[0m") } else { state };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{state}  {:width$}  {}", line.name, line.detail);
            if let Some(remedy) = &line.remedy {
                let indent = " ".repeat(8 + 2 + width + 2);
                for (n, part) in wrap(remedy, 88).into_iter().enumerate() {
                    let _ = writeln!(text, "{indent}{} {part}", if n == 0 { "→" } else { " " });
                }
            }
        }
        let count = |state| self.checks.iter().filter(|line| line.state == state).count();
        let _ = match (count(State::Missing), count(State::Degraded)) {
            (0, 0) => writeln!(text, "\nThis host is ready."),
            (0, degraded) => writeln!(text, "\nThis host is ready, with {degraded} degraded."),
            (missing, _) => writeln!(text, "\nThis host is not ready: {missing} missing."),
        };
        text
    }
}

/// Breaks `text` at spaces into lines of at most `width` characters (longer only for a longer word).
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::CHECKS;
    use super::*;

    fn report(findings: Vec<Finding>) -> Report {
        Report::new(CHECKS.iter().copied().zip(findings))
    }

    #[test]
    fn degraded_is_still_ready_and_missing_is_not() {
        let fine = report(vec![Finding::ok("a"), Finding::degraded("b", "do b")]);
        assert!(fine.ok);
        assert!(fine.table(false).ends_with("\nThis host is ready, with 1 degraded.\n"));
        let bad = report(vec![Finding::ok("a"), Finding::missing("b", "do b")]);
        assert!(!bad.ok);
        assert!(bad.table(false).ends_with("\nThis host is not ready: 1 missing.\n"));
    }

    #[test]
    fn the_remedy_stands_below_its_check() {
        let table = report(vec![Finding::missing("gone", "get it back")]).table(false);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "missing   kvm  gone");
        assert_eq!(lines[1], "               → get it back");
    }

    #[test]
    fn colours_only_when_asked() {
        let one = report(vec![Finding::ok("a")]);
        assert!(!one.table(false).contains('\x1b'));
        assert!(one.table(true).contains("\x1b[32mok"));
    }

    #[test]
    fn json_has_a_remedy_field_even_when_there_is_none() {
        let json = serde_json::to_value(report(vec![Finding::ok("a")])).unwrap();
        assert_eq!(json["ok"], true);
        assert_eq!(json["checks"][0]["state"], "ok");
        assert!(json["checks"][0]["remedy"].is_null());
    }

    #[test]
    fn wraps_at_spaces() {
        assert_eq!(wrap("a bb ccc", 4), ["a bb", "ccc"]);
        assert_eq!(wrap("longword x", 4), ["longword", "x"]);
        assert!(wrap("", 4).is_empty());
    }
}
