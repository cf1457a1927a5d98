//! Names and tags that users give.

use std::collections::BTreeMap;

/// Most tags a thing may have, and their lengths in bytes: EC2's limits.
const TAGS: usize = 50;
const TAG_KEY: usize = 128;
const TAG_VALUE: usize = 256;
/// Longest name.
const NAME: usize = 63;

/// A name or tag that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{0:?} must be 1 to 63 letters, digits, '-', '_' or '.', and begin with a letter or digit")]
    Name(String),
    #[error("there are {0} tags; at most {TAGS} are possible")]
    TooManyTags(usize),
    #[error(
        "tag {0:?}: a key has 1 to {TAG_KEY} bytes, a value at most {TAG_VALUE}, neither control characters"
    )]
    Tag(String),
}

/// Checks a name that a user chose for something.
///
/// # Errors
///
/// [`NameError::Name`].
pub fn check_name(name: &str) -> Result<(), NameError> {
    let fits = (1..=NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if fits { Ok(()) } else { Err(NameError::Name(name.to_owned())) }
}

/// Checks the tags a user gives to something.
///
/// # Errors
///
/// [`NameError::TooManyTags`], [`NameError::Tag`].
pub fn check_tags(tags: &BTreeMap<String, String>) -> Result<(), NameError> {
    if tags.len() > TAGS {
        return Err(NameError::TooManyTags(tags.len()));
    }
    let fits = |(key, value): (&String, &String)| {
        (1..=TAG_KEY).contains(&key.len())
            && value.len() <= TAG_VALUE
            && !key.chars().chain(value.chars()).any(char::is_control)
    };
    match tags.iter().find(|tag| !fits(*tag)) {
        Some((key, _)) => Err(NameError::Tag(key.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_plain_characters() {
        for good in ["a", "web-1", "My_key.2026", &"x".repeat(63)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", ".a", "a b", "../x", "ä", "a/b", "a\n", &"x".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tags_are_bounded() {
        let tags = |n: usize| (0..n).map(|i| (format!("k{i}"), "v".to_owned())).collect::<BTreeMap<_, _>>();
        assert_eq!(check_tags(&tags(50)), Ok(()));
        assert_eq!(check_tags(&tags(51)), Err(NameError::TooManyTags(51)));
        assert!(check_tags(&[("".into(), "v".into())].into()).is_err());
        assert!(check_tags(&[("k".into(), "a\u{7}".into())].into()).is_err());
        assert!(check_tags(&[("k".into(), "x".repeat(257))].into()).is_err());
    }
}
