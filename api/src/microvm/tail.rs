//! The last lines of a file that a guest may have written: bounded, and safe to show on a terminal.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// No more than this is read from the end of the file.
const WINDOW: u64 = 16 << 10;

/// At most `count` lines from the end of the file, without control characters. Empty if it cannot be read.
pub fn last_lines(path: &Path, count: usize) -> Vec<String> {
    let Ok(bytes) = read_end(path) else { return Vec::new() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(printable).filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}

fn read_end(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(WINDOW)))?;
    let mut bytes = Vec::new();
    file.take(WINDOW).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The line without escape sequences and other control characters.
fn printable(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' if chars.peek() == Some(&'[') => {
                chars.next();
                // Parameters up to the letter that ends a control sequence.
                while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
            }
            '\t' => clean.push(' '),
            c if c.is_control() => {}
            c => clean.push(c),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(content: &[u8], count: usize) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        last_lines(file.path(), count)
    }

    #[test]
    fn gives_the_last_lines_that_say_something() {
        assert_eq!(last(b"a\r\nb\n\nc\n   \n", 2), ["b", "c"]);
        assert_eq!(last(b"", 2), Vec::<String>::new());
        assert_eq!(last_lines(Path::new("/nonexistent"), 2), Vec::<String>::new());
    }

    #[test]
    fn a_guest_cannot_steer_the_terminal() {
        assert_eq!(
            last(b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b\xff", 1),
            ["red ]0;title \u{fffd}\u{fffd}"]
        );
    }

    #[test]
    fn a_huge_file_costs_no_more_than_a_small_one() {
        let mut content = vec![b'x'; 1 << 20];
        content.extend_from_slice(b"\nend\n");
        let lines = last(&content, 5);
        assert_eq!(lines.last().unwrap(), "end");
        assert!(lines[0].len() <= WINDOW as usize);
    }
}
