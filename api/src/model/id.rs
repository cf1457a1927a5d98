//! Names that Pulau gives: a prefix that tells the kind, and 17 hexadecimal digits, as EC2's.

/// Hexadecimal digits behind the prefix.
const DIGITS: usize = 17;

/// Prefixes of each kind.
pub const INSTANCE: &str = "i";
pub const IMAGE: &str = "img";
pub const NETWORK: &str = "net";
pub const SECURITY_GROUP: &str = "sg";
pub const KEY_PAIR: &str = "key";
pub const PATCH: &str = "patch";
pub const VOLUME: &str = "vol";
pub const SNAPSHOT: &str = "snap";
pub const GROUP: &str = "grp";
pub const LOAD_BALANCER: &str = "lb";
pub const API_TOKEN: &str = "tok";

/// A new one, unlike any other: `i-0123456789abcdef0`.
pub fn new(prefix: &str) -> String {
    let mut id = format!("{prefix}-{}", hex(&random::<{ DIGITS.div_ceil(2) }>()));
    id.truncate(prefix.len() + 1 + DIGITS);
    id
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Random bytes from the kernel.
///
/// # Panics
///
/// If the kernel has none, which Linux since 3.17 always has once it has booted.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let filled = getrandom::fill(&mut bytes);
    assert!(filled.is_ok(), "no random numbers: {filled:?}");
    bytes
}

/// Whether `text` could be an id with this prefix.
pub fn is_id(prefix: &str, text: &str) -> bool {
    let digits = text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
    digits.is_some_and(|digits| {
        digits.len() == DIGITS && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_well_formed_and_unlike_each_other() {
        let (a, b) = (new(INSTANCE), new(INSTANCE));
        assert!(is_id(INSTANCE, &a) && a.len() == 19, "{a}");
        assert_ne!(a, b);
        assert!(!is_id(IMAGE, &a) && !is_id(INSTANCE, "i-xyz") && !is_id(INSTANCE, &format!("{a}0")));
    }
}
