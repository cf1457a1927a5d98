//! What is typed, on its way to a guest; and the way out of a terminal whose guest no longer listens: `~.` at the
//! beginning of a line, as in ssh.

use std::io::{self, Read as _};

use tokio::sync::oneshot;

/// What the user typed so far at the beginning of the line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    LineStart,
    /// A `~` at its beginning, kept back until it is known whether a `.` follows.
    Tilde,
    Within,
}

/// Looks for the escape in what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    place: Place,
}

impl Escape {
    /// Puts into `out` what of `typed` is the guest's. Returns true if the user wants out; what was typed after
    /// that is dropped. `~~` stands for one `~`.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in typed {
            let next = match (self.place, byte) {
                (Place::Tilde, b'.') => return true,
                (Place::LineStart, b'~') => {
                    self.place = Place::Tilde;
                    continue;
                }
                (_, b'\r' | b'\n') => Place::LineStart,
                _ => Place::Within,
            };
            if self.place == Place::Tilde && byte != b'~' {
                out.push(b'~');
            }
            out.push(byte);
            self.place = next;
        }
        false
    }
}

/// Gives standard input to `write` until it ends, which is when this returns true; or until `write` fails, or the
/// user at a terminal wants out, which `left` is told. Without `left` there is no escape. Blocks.
pub fn copy_typed<E>(
    left: Option<oneshot::Sender<()>>,
    mut write: impl FnMut(&[u8]) -> Result<(), E>,
) -> bool {
    let mut escape = left.is_some().then(Escape::default);
    let mut buffer = [0; 16 << 10];
    let mut filtered = Vec::new();
    loop {
        let length = match io::stdin().lock().read(&mut buffer) {
            Ok(0) => return true,
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return true,
        };
        let mut bytes = &buffer[..length];
        if let Some(escape) = &mut escape {
            filtered.clear();
            if escape.filter(bytes, &mut filtered) {
                if let Some(left) = left {
                    let _ = left.send(());
                }
                return false;
            }
            bytes = &filtered;
        }
        if write(bytes).is_err() {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the guest gets of these pieces, and whether the user left.
    fn typed(pieces: &[&str]) -> (String, bool) {
        let (mut escape, mut out) = (Escape::default(), Vec::new());
        let left = pieces.iter().any(|piece| escape.filter(piece.as_bytes(), &mut out));
        (String::from_utf8(out).unwrap(), left)
    }

    #[test]
    fn leaves_at_the_beginning_of_a_line_only() {
        assert_eq!(typed(&["~."]), (String::new(), true));
        assert_eq!(typed(&["ls\r~.rest"]), ("ls\r".into(), true));
        assert_eq!(typed(&["ls ~.", "\r"]), ("ls ~.\r".into(), false));
    }

    #[test]
    fn works_however_the_bytes_arrive() {
        assert_eq!(typed(&["\r", "~", "."]), ("\r".into(), true));
        assert_eq!(typed(&["~", "/bin/x\r"]), ("~/bin/x\r".into(), false));
    }

    #[test]
    fn a_doubled_tilde_is_one() {
        assert_eq!(typed(&["~~."]), ("~.".into(), false));
    }

    #[test]
    fn a_tilde_and_a_new_line_begin_a_line() {
        assert_eq!(typed(&["~\r~."]), ("~\r".into(), true));
    }
}
