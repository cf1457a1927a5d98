//! Paths in an archive, which mean places in an image and nowhere else.

use std::fmt;

/// As in Linux: of a path and of each name in it, in bytes.
const LONGEST_PATH: usize = 4096;
const LONGEST_NAME: usize = 255;

/// Names from the root of an image down; none is empty, `.` or `..`, and none has a slash or NUL in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerPath(Vec<Vec<u8>>);

impl LayerPath {
    /// Reads a path as archives have it: `a/b`, `./a/b`, `a/b/` and `/a/b` are the same.
    ///
    /// # Errors
    ///
    /// What is wrong with it: a sentence. `..` is refused wherever it is: no honest archive has it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        if text.len() > LONGEST_PATH {
            return Err("its path is too long".to_owned());
        }
        if text.contains(&0) {
            return Err("its path has a NUL byte in it".to_owned());
        }
        let names = text.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
        let names: Vec<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
        if names.iter().any(|name| name == b"..") {
            return Err("its path has `..` in it".to_owned());
        }
        match names.iter().all(|name| name.len() <= LONGEST_NAME) {
            true => Ok(LayerPath(names)),
            false => Err("a name in its path is too long".to_owned()),
        }
    }

    /// The names of the directories, and the last name. None for the root.
    pub fn split(&self) -> Option<(&[Vec<u8>], &[u8])> {
        self.0.split_last().map(|(name, names)| (names, name.as_slice()))
    }

    /// The same directory, another last name.
    pub fn with_name(&self, name: &[u8]) -> Self {
        let mut path = self.parent();
        path.0.push(name.to_vec());
        path
    }

    /// The directory it is in; of the root, the root.
    pub fn parent(&self) -> Self {
        LayerPath(self.0.split_last().map(|(_, names)| names.to_vec()).unwrap_or_default())
    }
}

impl fmt::Display for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/")?;
        for (at, name) in self.0.iter().enumerate() {
            write!(f, "{}{}", if at > 0 { "/" } else { "" }, String::from_utf8_lossy(name).escape_default())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_has_one_path() {
        for same in ["a/b", "./a/b", "a/b/", "/a/b", "//a/./b//"] {
            assert_eq!(LayerPath::parse(same.as_bytes()).unwrap().to_string(), "/a/b", "{same}");
        }
        for root in ["", ".", "./", "/"] {
            assert_eq!(LayerPath::parse(root.as_bytes()), Ok(LayerPath::default()), "{root}");
        }
        assert_eq!(LayerPath::parse(b"a/b").unwrap().with_name(b"c").to_string(), "/a/c");
    }

    #[test]
    fn tricks_are_refused() {
        let long = "a/".repeat(2049);
        let name = "a".repeat(256);
        for bad in ["..", "../a", "a/../b", "a/..", "/..", "a\0b", &long, &name] {
            assert!(LayerPath::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        // These are names like any other.
        for fine in ["...", "..a", "a..", "a/ /b", "\n"] {
            assert!(LayerPath::parse(fine.as_bytes()).is_ok(), "{fine}");
        }
    }
}
