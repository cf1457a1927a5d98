//! The update of one guest's packages, as its agent does it: a script, and what it says.

use std::time::Duration;

use crate::model::PackageChange;

/// See the script's first lines.
const SCRIPT: &str = include_str!("guest.sh");
/// Changed packages that are told.
const PACKAGES: usize = 1000;
/// Longest name or version that is taken for one.
const WORD: usize = 256;
/// Of the output, in bytes.
const OUTPUT: usize = 4096;

/// What is asked of the guest.
#[derive(Clone, Copy, Debug)]
pub enum Verb {
    Start { within: Duration },
    Look,
    Cancel,
}

/// The command for a guest's agent.
pub fn command(verb: Verb, patch: &str) -> Vec<String> {
    let (name, seconds) = match verb {
        Verb::Start { within } => ("start", within.as_secs()),
        Verb::Look => ("look", 0),
        Verb::Cancel => ("cancel", 0),
    };
    ["sh", "-c", SCRIPT, "pulau-patch", name, patch, &seconds.to_string()].map(str::to_owned).to_vec()
}

/// What a guest says of its update. It may say anything: nothing here is more than text for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    pub progress: Progress,
    pub exit_code: i32,
    pub reboot_required: bool,
    pub packages: Vec<PackageChange>,
    pub output: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Progress {
    /// The guest knows of no update of this name: it has booted anew, for one.
    #[default]
    Unknown,
    Running,
    Done,
}

impl Look {
    /// Takes what the script's `look` prints.
    pub fn parse(text: &str) -> Self {
        let (head, output) = text.split_once("output\n").unwrap_or((text, ""));
        let mut look = Look { output: tail(output), ..Default::default() };
        for line in head.lines() {
            let mut words = line.split_whitespace().filter(|word| word.len() <= WORD);
            match (words.next(), words.next(), words.next(), words.next()) {
                (Some("state"), Some("running"), ..) => look.progress = Progress::Running,
                (Some("state"), Some("done"), ..) => look.progress = Progress::Done,
                (Some("exit"), Some(code), ..) => look.exit_code = code.parse().unwrap_or(1),
                (Some("reboot"), ..) => look.reboot_required = true,
                (Some("package"), Some(name), Some(old), Some(new)) if look.packages.len() < PACKAGES => {
                    let version = |word: &str| (word != "-").then(|| word.to_owned());
                    let (old_version, new_version) = (version(old), version(new));
                    look.packages.push(PackageChange { name: name.to_owned(), old_version, new_version });
                }
                _ => {}
            }
        }
        look
    }

    /// The last line of the output, for who waits.
    pub fn last_line(&self) -> Option<String> {
        let line = self.output.lines().rev().find(|line| !line.trim().is_empty())?;
        Some(line.chars().filter(|c| !c.is_control()).take(WORD).collect())
    }
}

/// The end of a text, at a character's beginning.
fn tail(text: &str) -> String {
    let mut from = text.len().saturating_sub(OUTPUT);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_taken_as_far_as_it_makes_sense() {
        let text = "state done\nexit 0\nreboot required\npackage libc6 2.36-9 2.36-10\npackage new - 1\n\
                    package gone 1 -\npackage odd\nrubbish\noutput\nReading\u{1b}[0m\noutput\nDone.\n\n";
        let look = Look::parse(text);
        assert_eq!((look.progress, look.exit_code, look.reboot_required), (Progress::Done, 0, true));
        let versions: Vec<_> = look
            .packages
            .iter()
            .map(|p| (p.name.as_str(), p.old_version.as_deref(), p.new_version.as_deref()))
            .collect();
        let expected =
            [("libc6", Some("2.36-9"), Some("2.36-10")), ("new", None, Some("1")), ("gone", Some("1"), None)];
        assert_eq!(versions, expected);
        assert_eq!(look.output, "Reading\u{1b}[0m\noutput\nDone.\n\n");
        assert_eq!(look.last_line().as_deref(), Some("Done."));
        assert_eq!(Look::parse(""), Look::default());
        let long = Look::parse(&format!("state running\noutput\n{}", "ä".repeat(5000)));
        assert_eq!((long.progress, long.output.len()), (Progress::Running, OUTPUT));
    }
}
